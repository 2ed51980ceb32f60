// Ghost batch norm (Hoffer, Hubara and Soudry 2017, arXiv 1705.08741, section 4): batch norm in training over
// chunks of `virtual_batch_size` consecutive rows of dimension 0, each by its own statistics, as a loop over the
// chunks computes it. The statistics of all chunks travel as one float64 tensor of shape (slots, 2, C).
#pragma once

#include "decompose.h"

namespace torch_bn::ops {

// The public operator. In evaluation it is ordinary batch norm.
at::Tensor ghost_batch_norm(const at::Tensor& input, const std::optional<at::Tensor>& weight,
                            const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& running_mean,
                            const std::optional<at::Tensor>& running_var,
                            const std::optional<at::Tensor>& num_batches_tracked, bool training,
                            std::optional<double> momentum, double eps, int64_t virtual_batch_size);

OutputAndStats ghost_batch_norm_forward(const at::Tensor& input, const std::optional<at::Tensor>& weight,
                                        const std::optional<at::Tensor>& bias,
                                        const std::optional<at::Tensor>& running_mean,
                                        const std::optional<at::Tensor>& running_var,
                                        const std::optional<at::Tensor>& num_batches_tracked,
                                        std::optional<double> momentum, double eps, int64_t virtual_batch_size);

Gradients ghost_batch_norm_backward(const at::Tensor& grad_output, const at::Tensor& input,
                                    const std::optional<at::Tensor>& weight, const at::Tensor& stats, double eps,
                                    int64_t virtual_batch_size, OutputMask output_mask);

void check_ghost_forward(const at::Tensor& input, const std::optional<at::Tensor>& weight,
                         const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& running_mean,
                         const std::optional<at::Tensor>& running_var,
                         const std::optional<at::Tensor>& num_batches_tracked, double eps,
                         int64_t virtual_batch_size);

void check_ghost_backward(const at::Tensor& grad_output, const at::Tensor& input,
                          const std::optional<at::Tensor>& weight, const at::Tensor& stats,
                          int64_t virtual_batch_size);

// How many pairs of statistics are kept for a batch: the number of chunks, rounded up, and so a function of the
// size of dimension 0 alone. Where the last row joins the chunk before, the last slot holds zeros.
c10::SymInt ghost_slots(const at::Tensor& input, int64_t virtual_batch_size);

// How a batch is cut. The last chunk is as short as torch.split would make it; but a single value per channel has
// no variance, and a last row with no more joins the chunk before. Even an empty batch is one chunk, and is
// counted.
class Chunks {
 public:
  // Of an input whose sizes are numbers by now.
  Chunks(const at::Tensor& input, int64_t virtual_batch_size);

  int64_t count() const { return count_; }
  int64_t begin(int64_t chunk) const { return chunk * size_; }
  int64_t end(int64_t chunk) const { return chunk == count_ - 1 ? rows_ : (chunk + 1) * size_; }
  int64_t size(int64_t chunk) const { return end(chunk) - begin(chunk); }
  // A view of the chunk's rows.
  at::Tensor of(const at::Tensor& batch, int64_t chunk) const;

 private:
  int64_t rows_;
  int64_t size_;
  int64_t count_;
};

// Ghost batch norm as a loop over the chunks, in the differentiable operators of `decompose`.
namespace decompose {

OutputAndStats ghost_forward(const at::Tensor& input, const std::optional<at::Tensor>& weight,
                             const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& running_mean,
                             const std::optional<at::Tensor>& running_var,
                             const std::optional<at::Tensor>& num_batches_tracked, std::optional<double> momentum,
                             double eps, int64_t virtual_batch_size);

Gradients ghost_backward(const at::Tensor& grad_output, const at::Tensor& input,
                         const std::optional<at::Tensor>& weight, const at::Tensor& stats, double eps,
                         int64_t virtual_batch_size, OutputMask output_mask);

BackwardGradients ghost_double_backward(const Gradients& grads, const at::Tensor& grad_output,
                                        const at::Tensor& input, const at::Tensor& weight, const at::Tensor& stats,
                                        double eps, int64_t virtual_batch_size);

}  // namespace decompose
}  // namespace torch_bn::ops
