// Handles of objects. Their numbers are never reused in a process, so a handle of a destroyed
// object, or from before a reset, is recognised as invalid.
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
