// Batch norm over the processes of a group: the private operators it is made of, and the public one. What travels
// does so in one all-gather of the group, found by its name; in torch's functional collective where a call is
// traced.
#pragma once

#include <string>

#include "ops.h"

namespace torch_bn::ops::sync {

// What one process says of its rows travels as float64 of shape (2 + 2 C): the number of rows, the mark, two
// values per channel. `relu` is a Relu. The mark is a whole number that is the same in all processes if they run
// the same layer with the same settings in the same direction. The two values are mean and M2 here.
at::Tensor moments(const at::Tensor& input, int64_t mark, int64_t relu);

// Statistics, running statistics and the output of the local rows. `parts` is (processes, 2 + 2 C). The statistics
// travel to the backward as float64 of shape (2 C + 1): mean, 1 / sqrt(var + eps), number of rows.
OutputAndStats normalise(const at::Tensor& input, const at::Tensor& parts, const std::optional<at::Tensor>& weight,
                         const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& running_mean,
                         const std::optional<at::Tensor>& running_var,
                         const std::optional<at::Tensor>& num_batches_tracked, std::optional<double> momentum,
                         double eps, c10::string_view layer, int64_t relu);

// The two values are sum(g) and sum(g * (x - mean)). The bias, and here the weight, count only for a ReLU that
// comes after: its mask is computed again.
at::Tensor gradient_sums(const at::Tensor& grad_output, const at::Tensor& input,
                         const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias,
                         const at::Tensor& stats, int64_t mark, int64_t relu);

// grad_input of the local rows, given the sums of all, (processes, 2 + 2 C).
at::Tensor gradient(const at::Tensor& grad_output, const at::Tensor& input,
                    const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias,
                    const at::Tensor& stats, const at::Tensor& parts, c10::string_view layer, int64_t relu);

// The whole layer in training, with its autograd and its collectives: one gather in the forward, one in the
// backward if the input needs a gradient. (A gather and a sum in the order of the ranks give all processes the
// same bits on any backend, and take half the steps of an all-reduce, whose fewer bytes count only for very many
// channels.) With `agree` the processes first make sure that they all mean the same.
at::Tensor batch_norm(const at::Tensor& input, const std::optional<at::Tensor>& weight,
                      const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& running_mean,
                      const std::optional<at::Tensor>& running_var,
                      const std::optional<at::Tensor>& num_batches_tracked, std::optional<double> momentum,
                      double eps, c10::string_view group, int64_t processes, c10::string_view layer, bool agree,
                      int64_t relu);

// Compares what every process of the group is about to do, and throws in all of them, with the differences in
// words, unless it is the same. A process that does not come makes the others throw after the group's timeout.
void agree_on(const std::string& settings, const std::string& group, const std::string& layer);

// The collective: the parts of all processes, one a row. What the backend throws is thrown again with the names of
// layer and collective before it.
at::Tensor all_gather(const at::Tensor& part, int64_t processes, c10::string_view group, c10::string_view layer,
                      const char* direction);

// The layer as messages name it.
inline std::string name_of(c10::string_view layer) {
  return "SyncBatchNorm1d" + (layer.empty() ? std::string() : " '" + std::string(layer) + "'");
}

}  // namespace torch_bn::ops::sync
