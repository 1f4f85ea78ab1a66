// The memory of the simulated devices and the pinned memory of the host: physical allocations,
// address reservations and the page table between them. Guarded by the simulator's lock.
//
// A physical allocation consists of slots of one large store, which the kernel backs when it is
// touched. Once it is exported, it is a file of its own instead (shared.h). A device address is a
// PROT_NONE mapping, so that a CPU access faults as it does on a machine with a GPU. If the CPU was
// given access to memory of the host, its slots are also mapped at that address. The page table is
// one array of pointers per reservation.
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <unordered_map>

#include "simcuda/handles.h"
#include "simcuda/machine.h"
#include "simcuda/options.h"
#include "simcuda/shadow.h"

namespace warmserve::simcuda {

struct Physical {
  std::uint64_t handle = 0;  // 0: made by cuMemAlloc
  int device = 0;
  bool host = false;        // memory of the host, location HOST_NUMA
  std::uint64_t bytes = 0;  // whole granules
  CUmemAllocationProp prop{};
  std::vector<std::uint32_t> slots;  // empty if there is a file
  std::unique_ptr<SharedFile> file;  // set once the allocation was exported or imported
  std::uint64_t references = 0, mappings = 0, pins = 0;  // pins: running operations that use it
  Shadow shadow;

  explicit Physical(std::uint64_t granules) : shadow(granules) {}
};

struct Mapping {
  Address begin = 0;
  std::uint64_t bytes = 0;
  Physical* physical = nullptr;
  std::array<std::uint8_t, kMaxDevices> access{};  // CUmemAccess_flags per device
  std::uint8_t cpu_access = 0;                     // CUmemAccess_flags of the host
  Uses uses;

  Address end() const { return begin + bytes; }
};

struct Reservation {
  Address begin = 0;
  std::uint64_t bytes = 0;
  bool plain = false;             // made by cuMemAlloc and ended by cuMemFree
  CUcontext context = nullptr;    // set if plain
  std::uint64_t mapped = 0;       // number of mappings in the reservation
  Mapping** pages = nullptr;      // one per granule; null if the granule is not mapped
  std::uint64_t table_bytes = 0;  // size of `pages`
};

struct Pinned {
  Address begin = 0;
  std::uint64_t bytes = 0;
  unsigned flags = 0;
  bool allocated = false;  // true: allocated by the driver; false: registered by the program
  CUcontext context = nullptr;
  // A second mapping of the pages, because pinned pages stay when the program unmaps them. Null if
  // the pages cannot be mapped twice (only a shared mapping can).
  std::byte* pages = nullptr;
  Uses uses;
  Shadow shadow;

  bool read_only() const { return !allocated && (flags & CU_MEMHOSTREGISTER_READ_ONLY); }

  Pinned(Address at, std::uint64_t size, std::uint64_t granules)
      : begin(at), bytes(size), shadow(granules) {}
};

// The part of a range that lies in one granule.
struct Piece {
  Mapping* mapping;
  std::uint64_t page;        // index in the physical allocation
  std::uint32_t begin, end;  // bytes of the page
};

enum class Place { device, pinned, pageable, broken };  // broken: partly pinned, or wraps around

class Memory {
 public:
  // `machine`: null if no other process uses the devices.
  Memory(const Options& options, std::unique_ptr<Machine> machine);
  ~Memory();
  Memory(const Memory&) = delete;

  std::uint64_t granularity() const { return granularity_; }
  std::uint64_t available(int device) const;
  void others_hold(std::uint64_t bytes) { others_ = bytes; }

  CUresult reserve(std::uint64_t bytes, std::uint64_t alignment, Address hint, Reservation** out);
  void unreserve(Reservation* reservation);
  Reservation* reservation_at(Address address);  // contains the address; null: no reservation does

  CUresult create(std::uint64_t bytes, int device, bool host, Physical** out);
  Physical* find(std::uint64_t handle);  // null if unknown or without references
  void give_handle(Physical* physical);
  void drop_reference(Physical* physical);
  // Makes an allocation importable, by copying it to a file of its own. Precondition: no operation
  // accesses it.
  CUresult share(Physical* physical);
  // Finds the allocation of a descriptor, or makes one of another process's allocation.
  CUresult import(int descriptor, Physical** out);
  void pin(Physical* physical) { ++physical->pins; }
  void unpin(Physical* physical);

  bool is_free(const Reservation& reservation, Address address, std::uint64_t bytes) const;
  Mapping* map(Reservation& reservation, Address address, std::uint64_t bytes, Physical* physical);
  void unmap(Reservation& reservation, Mapping* mapping);
  // Sets the CPU's access to a mapping of host memory. Returns false, and leaves no access, if the
  // kernel refuses.
  bool set_cpu_access(Mapping* mapping, CUmemAccess_flags access);
  Mapping* mapping_at(Address address);
  // Returns the mappings that make up exactly this range; empty if the range cuts a mapping or has
  // a hole. Valid until the next call.
  const std::vector<Mapping*>& whole(Address address, std::uint64_t bytes);
  // Appends the pieces of a range to `out`. Returns false if part of the range is not mapped, after
  // appending the pieces before that part.
  bool walk(Address address, std::uint64_t bytes, std::vector<Piece>* out);
  std::byte* slot(const Physical& physical, std::uint64_t page) const {
    return physical.file ? physical.file->contents() + page * slot_bytes_
                         : store_ + physical.slots[page] * slot_bytes_;
  }
  std::uint64_t kept() const { return kept_; }
  void close_in_child() const {
    if (machine_) machine_->close_in_child();
  }

  CUresult pin_host(Address address, std::uint64_t bytes, Pinned** out);
  // Returns whether the kernel provides the pages with that access. Touches the pages, so it is
  // called without the lock.
  static bool can_pin(Address address, std::uint64_t bytes, bool writable);
  void keep_pages(Pinned* pinned);
  void unpin_host(Pinned* pinned);
  Pinned* pinned_at(Address address);  // contains the address; null: no pinned range does
  // Returns an address at which the bytes of a pinned range can be accessed now; null if the
  // program has unmapped them.
  std::byte* reach(const Pinned& pinned, Address address, std::uint64_t bytes) const;
  // When a context ends, frees the memory that cuMemAlloc and the pinning calls made in it.
  void free_all_of(CUcontext context);
  void free_plain(Reservation* reservation);
  Place place(Address address, std::uint64_t bytes);

  std::size_t count_physical() const { return physical_count_; }  // with a handle or mapped
  std::size_t count_reservations(bool plain) const;
  std::size_t count_mappings() const { return mapping_count_; }
  std::size_t count_pinned(bool allocated) const;

 private:
  void forget_if_dead(Physical* physical);
  void free_slots(Physical* physical);
  bool show_to_cpu(const Mapping& mapping, int protection);
  // Returns the pool that an allocation counts against: a device's, or the host's if the host has
  // memory of its own.
  std::size_t pool_of(int device, bool host) const {
    return host && !one_memory_ ? kMaxDevices : static_cast<std::size_t>(device);
  }
  // Returns the same pool in the machine's table.
  std::size_t machine_pool(std::size_t pool) const {
    return pool < devices_.size() ? static_cast<std::size_t>(devices_[pool]) : pool;
  }
  std::uint64_t used(std::size_t pool) const {
    return machine_ ? machine_->used(machine_pool(pool)) : used_[pool];
  }
  // Returns the bytes of a pool that the simulated processes may use.
  std::uint64_t usable(std::size_t pool) const {
    return capacity_ - std::min(capacity_, pool == 0 ? others_ : 0);
  }
  bool take(std::size_t pool, std::uint64_t bytes);

  const std::uint64_t granularity_, kept_, slot_bytes_, capacity_;
  const bool one_memory_;
  const std::vector<int> devices_;  // the index of each visible device on the machine
  const std::unique_ptr<Machine> machine_;
  int store_file_ = -1;  // set only if the CPU may access the store
  std::byte* store_ = nullptr;
  std::uint64_t store_bytes_ = 0;
  std::uint32_t next_slot_ = 0;
  std::vector<std::uint32_t> free_slots_;
  std::array<std::uint64_t, Machine::kPools> used_{};  // bytes that this process uses, per pool
  std::uint64_t others_ = 0;                           // bytes of device 0 that others hold

  std::unordered_map<std::uint64_t, Physical*> handles_;
  std::unordered_map<std::uint64_t, Physical*> shared_;  // by the identity of their files
  std::size_t physical_count_ = 0, mapping_count_ = 0;
  std::map<Address, std::unique_ptr<Reservation>> reservations_;
  Reservation* last_ = nullptr;  // the reservation found by the last lookup
  std::deque<Mapping> made_;     // storage of all mappings
  std::vector<Mapping*> spare_;  // elements of `made_` that are unused
  std::vector<Mapping*> range_;  // result of whole()
  std::map<Address, std::unique_ptr<Pinned>> pinned_;
};

}  // namespace warmserve::simcuda
