// Whether all processes of a group are about to do the same, found out before any collective of theirs: backends
// answer collectives that do not match with a hang, with wrong numbers, or by ending the process (gloo).
#include <ATen/ops/zeros.h>

#include <chrono>
#include <cstring>
#include <map>
#include <mutex>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#include <vector>

#include "sync.h"

namespace torch_bn::ops::sync {
namespace {

// How often each group has agreed; the same in all its processes, so the n-th call of one meets the n-th of
// another.
int64_t next_call(const std::string& group) {
  static std::mutex mutex;
  static std::map<std::string, int64_t> calls;
  const std::lock_guard<std::mutex> lock(mutex);
  return calls[group]++;
}

std::vector<std::string> keys_of(int64_t call, int processes) {
  std::vector<std::string> keys;
  for (int rank = 0; rank < processes; ++rank)
    keys.push_back("torch_bn/" + std::to_string(call) + "/" + std::to_string(rank));
  return keys;
}

std::string missing_ranks(c10d::Store& store, const std::vector<std::string>& keys) {
  std::string ranks;
  for (std::size_t rank = 0; rank < keys.size(); ++rank)
    if (!store.check({keys[rank]})) ranks += (ranks.empty() ? "" : ", ") + std::to_string(rank);
  return ranks;
}

// Through the group's store, beside the backend: so a process that is in another collective, or in none, harms
// nobody.
std::vector<std::string> gather_by_store(c10d::ProcessGroup& group, c10d::Store& store,
                                         const std::string& settings, const std::string& name) {
  const int64_t call = next_call(group.getGroupName());
  const int rank = group.getRank();
  const auto keys = keys_of(call, group.getSize());
  const auto timeout = group.getBackend(c10::DeviceType::CPU)->getBackendOptions()->timeout;
  try {
    store.set(keys[rank], std::vector<std::uint8_t>(settings.begin(), settings.end()));
    store.wait(keys, timeout);
  } catch (const std::exception& error) {
    std::string who = "another process";
    try {
      const std::string ranks = missing_ranks(store, keys);
      if (!ranks.empty()) who = "rank " + ranks;
    } catch (const std::exception&) {  // the store is gone: with the process that kept it
    }
    TORCH_CHECK(false, name, ": ", who, " of group '", group.getGroupName(),
                "' did not come to its forward within ", std::chrono::duration<double>(timeout).count(),
                " s, the group's timeout. It may have ended, hang, or have left the layer out.");
  }
  std::vector<std::string> all;
  for (const auto& value : store.multiGet(keys)) all.emplace_back(value.begin(), value.end());
  // Who has come here was done with the call before, as everybody was who is waited for here.
  if (call > 0) store.deleteKey(keys_of(call - 1, group.getSize())[rank]);
  return all;
}

// Of a group without a store, as those of MPI are: through the backend, in messages of one size.
std::vector<std::string> gather_by_backend(c10d::ProcessGroup& group, const std::string& settings,
                                           const std::string& layer) {
  constexpr int64_t kBytes = 1024;
  const at::Tensor own = at::zeros({kBytes}, at::kByte);
  std::memcpy(own.mutable_data_ptr(), settings.data(), std::min<std::size_t>(settings.size(), kBytes - 1));
  const at::Tensor gathered = all_gather(own, group.getSize(), group.getGroupName(), layer, "agreement");
  std::vector<std::string> all;
  for (int rank = 0; rank < group.getSize(); ++rank)
    all.emplace_back(static_cast<const char*>(gathered.const_data_ptr()) + rank * kBytes);
  return all;
}

}  // namespace

void agree_on(const std::string& settings, const std::string& group_name, const std::string& layer) {
  const auto group = c10d::resolve_process_group(group_name);
  const auto store = group->getStore();
  const auto all = store ? gather_by_store(*group, *store, settings, name_of(layer))
                         : gather_by_backend(*group, settings, layer);
  for (std::size_t rank = 1; rank < all.size(); ++rank)
    TORCH_CHECK(all[rank] == all[0], name_of(layer), ": the processes of group '", group_name,
                "' do not do the same. Rank 0: ", all[0], ". Rank ", rank, ": ", all[rank], ".");
}

}  // namespace torch_bn::ops::sync
