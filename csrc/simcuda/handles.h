// What callers hold of objects: numbers that are never used twice in a process, so that a handle
// of something destroyed, or of a simulator that was reset, is known for what it is.
#pragma once

#include <cstdint>
#include <memory>
#include <unordered_map>

namespace warmserve::simcuda {

std::uint64_t new_handle() noexcept;

template <class Handle, class Object>
class Handles {
 public:
  Handle add(std::shared_ptr<Object> object) {
    const std::uint64_t number = new_handle();
    objects_.emplace(number, std::move(object));
    return reinterpret_cast<Handle>(number);
  }
  Object* find(Handle handle) const {
    const auto found = objects_.find(reinterpret_cast<std::uint64_t>(handle));
    return found == objects_.end() ? nullptr : found->second.get();
  }
  std::shared_ptr<Object> take(Handle handle) {
    const auto node = objects_.extract(reinterpret_cast<std::uint64_t>(handle));
    return node.empty() ? nullptr : std::move(node.mapped());
  }
  template <class Predicate>
  void erase_if(Predicate predicate) {
    std::erase_if(objects_, [&](const auto& entry) { return predicate(*entry.second); });
  }
  template <class Visit>
  void each(Visit visit) const {
    for (const auto& [number, object] : objects_) visit(object);
  }
  std::size_t size() const { return objects_.size(); }

 private:
  std::unordered_map<std::uint64_t, std::shared_ptr<Object>> objects_;
};

}  // namespace warmserve::simcuda
