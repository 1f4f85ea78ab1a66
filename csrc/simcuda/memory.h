// Memory of the simulated devices and what is pinned of the host's: physical allocations, address
// reservations, the page table between them, all under the simulator's lock.
//
// A physical allocation is slots of one large store that the kernel backs when it is touched; a
// device address is a PROT_NONE mapping, so that the CPU dies where it would on a machine with a
// GPU. Where the CPU was given access to memory of the host, its slots are mapped there once more.
// The page table is one array of pointers for each reservation.
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <unordered_map>

#include "simcuda/handles.h"
#include "simcuda/options.h"
#include "simcuda/shadow.h"

namespace warmserve::simcuda {

struct Physical {
  std::uint64_t handle = 0;  // 0: made by cuMemAlloc
  int device = 0;
  bool host = false;        // memory of the host: location HOST_NUMA
  std::uint64_t bytes = 0;  // whole granules
  CUmemAllocationProp prop{};
  std::vector<std::uint32_t> slots;
  std::uint64_t references = 0, mappings = 0, pins = 0;  // pins: operations under way
  Shadow shadow;

  explicit Physical(std::uint64_t granules) : shadow(granules) {}
};

struct Mapping {
  Address begin = 0;
  std::uint64_t bytes = 0;
  Physical* physical = nullptr;
  std::array<std::uint8_t, kMaxDevices> access{};  // CUmemAccess_flags for each device
  std::uint8_t cpu_access = 0;                     // and for the host
  Uses uses;

  Address end() const { return begin + bytes; }
};

struct Reservation {
  Address begin = 0;
  std::uint64_t bytes = 0;
  bool plain = false;             // made by cuMemAlloc, which cuMemFree ends
  CUcontext context = nullptr;    // of a plain one
  std::uint64_t mapped = 0;       // mappings in it
  Mapping** pages = nullptr;      // one for each granule, null where nothing is mapped
  std::uint64_t table_bytes = 0;  // of `pages`
};

struct Pinned {
  Address begin = 0;
  std::uint64_t bytes = 0;
  unsigned flags = 0;
  bool allocated = false;  // by the driver, and not registered
  CUcontext context = nullptr;
  // The same pages once more, where they can be had (a shared mapping), or null: pinned pages stay
  // when the program unmaps them.
  std::byte* pages = nullptr;
  Uses uses;
  Shadow shadow;

  bool read_only() const { return !allocated && (flags & CU_MEMHOSTREGISTER_READ_ONLY); }

  Pinned(Address at, std::uint64_t size, std::uint64_t granules)
      : begin(at), bytes(size), shadow(granules) {}
};

// Part of a range that lies in one granule.
struct Piece {
  Mapping* mapping;
  std::uint64_t page;        // of the physical allocation
  std::uint32_t begin, end;  // bytes of the page
};

enum class Place { device, pinned, pageable, broken };  // broken: partly pinned, or wraps around

class Memory {
 public:
  explicit Memory(const Options& options);
  ~Memory();
  Memory(const Memory&) = delete;

  std::uint64_t granularity() const { return granularity_; }
  std::uint64_t used(int device) const { return used_[device]; }
  std::uint64_t available(int device) const;
  void others_hold(std::uint64_t bytes) { others_ = bytes; }

  CUresult reserve(std::uint64_t bytes, std::uint64_t alignment, Address hint, Reservation** out);
  void unreserve(Reservation* reservation);
  Reservation* reservation_at(Address address);  // that contains the address, or null

  CUresult create(std::uint64_t bytes, int device, bool host, Physical** out);
  Physical* find(std::uint64_t handle);  // with references, or null
  void give_handle(Physical* physical);
  void drop_reference(Physical* physical);
  void pin(Physical* physical) { ++physical->pins; }
  void unpin(Physical* physical);

  bool is_free(const Reservation& reservation, Address address, std::uint64_t bytes) const;
  Mapping* map(Reservation& reservation, Address address, std::uint64_t bytes, Physical* physical);
  void unmap(Reservation& reservation, Mapping* mapping);
  // Of memory of the host. False where the kernel refuses; then there is none.
  bool set_cpu_access(Mapping* mapping, CUmemAccess_flags access);
  Mapping* mapping_at(Address address);
  // The mappings that make up exactly this range; empty where one is cut or a hole is between
  // them. Good until the next call.
  const std::vector<Mapping*>& whole(Address address, std::uint64_t bytes);
  // The pieces of a range; false where part of it is not mapped, after the pieces before that.
  bool walk(Address address, std::uint64_t bytes, std::vector<Piece>* out);
  std::byte* slot(const Physical& physical, std::uint64_t page) const {
    return store_ + physical.slots[page] * slot_bytes_;
  }
  std::uint64_t kept() const { return kept_; }

  CUresult pin_host(Address address, std::uint64_t bytes, Pinned** out);
  // Whether the kernel gives the pages, with that access; touches them, so without the lock.
  static bool can_pin(Address address, std::uint64_t bytes, bool writable);
  void keep_pages(Pinned* pinned);
  void unpin_host(Pinned* pinned);
  Pinned* pinned_at(Address address);  // that contains the address, or null
  // Where the bytes of a pinned range can be reached now; null: the program unmapped them.
  std::byte* reach(const Pinned& pinned, Address address, std::uint64_t bytes) const;
  // A context ends, and with it what cuMemAlloc and the pinning calls made in it.
  void free_all_of(CUcontext context);
  void free_plain(Reservation* reservation);
  Place place(Address address, std::uint64_t bytes);

  std::size_t count_physical() const { return physical_count_; }  // with a handle or mapped
  std::size_t count_reservations(bool plain) const;
  std::size_t count_mappings() const { return mapping_count_; }
  std::size_t count_pinned(bool allocated) const;

 private:
  void forget_if_dead(Physical* physical);
  // Whose capacity an allocation is of: a device's, or the host's where that has memory of its own.
  int pool_of(int device, bool host) const { return host && !one_memory_ ? kMaxDevices : device; }

  const std::uint64_t granularity_, kept_, slot_bytes_, capacity_;
  const bool one_memory_;
  int store_file_ = -1;  // only where the CPU may reach it
  std::byte* store_ = nullptr;
  std::uint64_t store_bytes_ = 0;
  std::uint32_t next_slot_ = 0;
  std::vector<std::uint32_t> free_slots_;
  std::array<std::uint64_t, kMaxDevices + 1> used_{};  // of each pool
  std::uint64_t others_ = 0;                           // of device 0

  std::unordered_map<std::uint64_t, Physical*> handles_;
  std::size_t physical_count_ = 0, mapping_count_ = 0;
  std::map<Address, std::unique_ptr<Reservation>> reservations_;
  Reservation* last_ = nullptr;  // where the last address was found
  std::deque<Mapping> made_;     // all mappings there ever were at once
  std::vector<Mapping*> spare_;  // of those, the ones to use again
  std::vector<Mapping*> range_;  // whole()'s answer
  std::map<Address, std::unique_ptr<Pinned>> pinned_;
};

}  // namespace warmserve::simcuda
