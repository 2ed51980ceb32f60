#include "data.h"

#include <ATen/CPUGeneratorImpl.h>
#include <torch/torch.h>
#include <zlib.h>

#include <filesystem>

#include "idx.h"

namespace {

Idx find_and_read(const std::string& folder, const std::string& stem) {
  for (const char* end : {"", ".gz"}) {
    const auto path = std::filesystem::path(folder) / (stem + "-ubyte" + end);
    if (std::filesystem::is_regular_file(path)) return read_idx(path.string());
  }
  throw IdxError(folder + ": looked for " + stem + "-ubyte and " + stem + "-ubyte.gz, and found neither");
}

struct Raw {
  torch::Tensor images;  // (n, features) uint8
  torch::Tensor labels;  // (n) int64
};

Raw read_split(const std::string& folder, const std::string& prefix) {
  Idx images = find_and_read(folder, prefix + "-images-idx3");
  Idx labels = find_and_read(folder, prefix + "-labels-idx1");
  if (images.shape.size() != 3 || labels.shape.size() != 1 || images.shape[0] != labels.shape[0] ||
      images.values.empty())
    throw IdxError(folder + ": the images and labels of '" + prefix + "' do not belong together");
  for (const auto label : labels.values)
    if (label > 9) throw IdxError(folder + ": a label of '" + prefix + "' is not one of 0 to 9");
  const auto count = static_cast<int64_t>(images.shape[0]);
  const auto as_tensor = [](Idx& idx) {
    return torch::from_blob(idx.values.data(), {static_cast<int64_t>(idx.values.size())}, torch::kUInt8);
  };
  return {as_tensor(images).view({count, -1}).clone(), as_tensor(labels).to(torch::kInt64)};
}

}  // namespace

Dataset load_mnist(const std::string& folder) {
  const Raw train = read_split(folder, "train");
  const Raw test = read_split(folder, "t10k");
  if (train.images.size(1) != test.images.size(1))
    throw IdxError(folder + ": the images of 'train' and 't10k' differ in size");
  const int64_t count = train.images.size(0);
  const int64_t fitted = count - count / 10;
  if (fitted == count || fitted < 2) throw IdxError(folder + ": fewer than ten training images");
  const auto pixels = train.images.slice(0, 0, fitted).to(torch::kDouble);
  const auto mean = pixels.mean();
  const auto std = pixels.std(/*unbiased=*/false);
  TORCH_CHECK(std.item<double>() > 0, folder, ": all training images are of one colour");
  const auto scaled = [&](const torch::Tensor& images) {
    return ((images.to(torch::kDouble) - mean) / std).to(torch::kFloat);
  };
  const auto part = [&](int64_t from, int64_t to) {
    return Split{scaled(train.images.slice(0, from, to)), train.labels.slice(0, from, to)};
  };
  uLong checksum = crc32(0, nullptr, 0);
  for (const auto& array : {train.images, train.labels, test.images, test.labels})
    checksum = crc32_z(checksum, static_cast<const Bytef*>(array.const_data_ptr()), array.nbytes());
  return {
      part(0, fitted), part(fitted, count), {scaled(test.images), test.labels}, static_cast<uint32_t>(checksum)};
}

Batches::Batches(const Split& split, int64_t size, int64_t seed) : split_(split), size_(size), seed_(seed) {
  const int64_t count = split.labels.size(0);
  // A single row has no variance: batch norm refuses it in training.
  per_epoch_ = count % size == 1 ? count / size : (count + size - 1) / size;
}

std::pair<torch::Tensor, torch::Tensor> Batches::at(int64_t step) {
  const int64_t epoch = step / per_epoch_;
  if (epoch != epoch_) {
    const auto source = at::detail::createCPUGenerator(static_cast<uint64_t>(seed_ << 20 | epoch));
    order_ = torch::randperm(split_.labels.size(0), source);
    epoch_ = epoch;
  }
  const int64_t from = step % per_epoch_ * size_;
  const auto rows = order_.slice(0, from, std::min(from + size_, order_.size(0)));
  return {split_.inputs.index_select(0, rows), split_.labels.index_select(0, rows)};
}
