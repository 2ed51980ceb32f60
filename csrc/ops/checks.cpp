#include "checks.h"

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <charconv>
#include <cmath>
#include <iterator>
#include <string>

namespace torch_bn::ops {
namespace {

void check_rank(const at::Tensor& input) {
  TORCH_CHECK_VALUE(input.dim() == 2 || input.dim() == 3, "expected 2D or 3D input (got ", input.dim(),
                    "D input)");
}

// As torch.nn.functional.batch_norm: a single value per channel has no variance.
void check_more_than_one_row(const at::Tensor& input) {
  c10::SymInt rows = input.sym_size(0);
  if (input.dim() == 3) rows = rows * input.sym_size(2);
  if (TORCH_GUARD_OR_FALSE(rows.sym_ne(1))) return;
  if (!TORCH_GUARD_OR_FALSE(rows.sym_eq(1))) return;
  TORCH_CHECK_VALUE(false, "Expected more than 1 value per channel when training, got input size torch.Size(",
                    input.sym_sizes(), ")");
}

// Python's spelling of a float, as in torch's own message: the fewest digits that read back as the same number.
std::string in_pythons_words(double value) {
  char text[400];  // enough for the 309 digits of the largest double
  const bool scientific = value != 0.0 && (std::abs(value) < 1e-4 || std::abs(value) >= 1e16);
  const auto format = scientific ? std::chars_format::scientific : std::chars_format::fixed;
  const auto end = std::to_chars(std::begin(text), std::end(text), value, format).ptr;
  std::string words(text, end);
  if (std::isfinite(value) && words.find_first_of(".e") == std::string::npos) words += ".0";
  return words;
}

void check_eps(bool training, double eps) {
  TORCH_CHECK_VALUE(!(training && eps <= 0.0), "batch_norm eps must be positive during training, but got ",
                    in_pythons_words(eps));
  TORCH_CHECK_VALUE(!(eps < 0.0), "batch_norm eps must be non-negative, but got ", in_pythons_words(eps));
}

void check_features(const char* name, const std::optional<at::Tensor>& argument, const c10::SymInt& channels) {
  if (!is_given(argument)) return;
  TORCH_SYM_CHECK(argument->sym_numel().sym_eq(channels), name, " should contain ", channels, " elements not ",
                  argument->sym_numel());
}

// The kernels read raw pointers, and a tensor without data (on the meta device) has none.
void check_device(const at::Tensor& input, const at::Tensor& argument) {
  TORCH_CHECK(argument.device() == input.device(), "Tensor on device ", argument.device(),
              " is not on the expected device ", input.device(), "!");
}
void check_device(const at::Tensor& input, const std::optional<at::Tensor>& argument) {
  if (is_given(argument)) check_device(input, *argument);
}

void check_one_dimension(const std::optional<at::Tensor>& statistics) {
  TORCH_CHECK(!is_given(statistics) || statistics->dim() == 1, "TensorAccessor expected 1 dims but tensor has ",
              statistics->dim());
}

// Parameters and statistics share one type: the input's, or float32 beside a 16-bit input.
void check_dtypes(const at::Tensor& input, std::initializer_list<const std::optional<at::Tensor>*> parameters) {
  const auto dtype = input.scalar_type();
  const bool has_16_bits = dtype == at::kBFloat16 || dtype == at::kHalf;
  TORCH_CHECK_NOT_IMPLEMENTED(dtype == at::kFloat || dtype == at::kDouble || has_16_bits,
                              "\"batch_norm\" not implemented for '", dtype, "'");
  std::optional<at::ScalarType> first;
  for (const auto* parameter : parameters)
    if (!first && is_given(*parameter)) first = (*parameter)->scalar_type();
  const bool mixed = first && *first != dtype;
  for (const auto* parameter : parameters) {
    if (!is_given(*parameter)) continue;
    const auto own = (*parameter)->scalar_type();
    if (mixed) {
      TORCH_CHECK(own == at::kFloat, "mixed dtype (CPU): expect parameter to have scalar type of Float");
    } else {
      TORCH_CHECK(own == dtype, "expected scalar type ", dtype, " but found ", own);
    }
  }
  TORCH_CHECK(!mixed || has_16_bits, "mixed dtype (CPU): all inputs must share same datatype.");
}

void check_no_grad(const char* name, const std::optional<at::Tensor>& statistics) {
  TORCH_CHECK(!is_given(statistics) || !statistics->requires_grad(),
              "The function 'native_batch_norm' is not differentiable with respect to argument '", name,
              "'. This input cannot have requires_grad True.");
}

}  // namespace

void check_relu(int64_t relu) {
  TORCH_CHECK(is(relu, Relu::none) || is(relu, Relu::after) || is(relu, Relu::before),
              "relu should be 0 (none), 1 (after) or 2 (before), not ", relu);
}

void check_forward(const at::Tensor& input, const std::optional<at::Tensor>& weight,
                   const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& running_mean,
                   const std::optional<at::Tensor>& running_var,
                   const std::optional<at::Tensor>& num_batches_tracked, bool training, double eps, int64_t relu) {
  check_relu(relu);
  check_rank(input);
  if (training) check_more_than_one_row(input);
  check_forward_but_rows(input, weight, bias, running_mean, running_var, num_batches_tracked, training, eps);
}

void check_forward_but_rows(const at::Tensor& input, const std::optional<at::Tensor>& weight,
                            const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& running_mean,
                            const std::optional<at::Tensor>& running_var,
                            const std::optional<at::Tensor>& num_batches_tracked, bool training, double eps) {
  check_rank(input);
  check_eps(training, eps);
  const c10::SymInt channels = input.sym_size(1);
  TORCH_CHECK(training || is_given(running_mean), "running_mean must be defined in evaluation mode");
  check_features("running_mean", running_mean, channels);
  TORCH_CHECK(training || is_given(running_var), "running_var must be defined in evaluation mode");
  check_features("running_var", running_var, channels);
  check_features("weight", weight, channels);
  check_features("bias", bias, channels);
  TORCH_CHECK_VALUE(is_given(running_mean) == is_given(running_var),
                    "running_mean and running_var must either both be None or neither be None");
  for (const auto* argument : {&weight, &bias, &running_mean, &running_var, &num_batches_tracked})
    check_device(input, *argument);
  check_dtypes(input, {&weight, &bias, &running_mean, &running_var});
  check_one_dimension(running_mean);
  check_one_dimension(running_var);
  if (is_given(num_batches_tracked)) {
    TORCH_CHECK(num_batches_tracked->dim() == 0 && num_batches_tracked->scalar_type() == at::kLong,
                "num_batches_tracked should be a 0-dim tensor of scalar type Long but found ",
                num_batches_tracked->dim(), " dims of scalar type ", num_batches_tracked->scalar_type());
  }
}

void check_backward(const at::Tensor& grad_output, const at::Tensor& input,
                    const std::optional<at::Tensor>& weight, const at::Tensor& stats,
                    const std::optional<at::Tensor>& bias, int64_t relu) {
  check_relu(relu);
  check_rank(input);
  check_device(input, grad_output);
  check_device(input, weight);
  check_device(input, bias);
  check_device(input, stats);
  check_dtypes(input, {&weight, &bias});
  check_features("weight", weight, input.sym_size(1));
  check_features("bias", bias, input.sym_size(1));
  TORCH_CHECK(grad_output.dim() == input.dim(), "grad_output should have ", input.dim(), " dims not ",
              grad_output.dim());
  for (int64_t d = 0; d < input.dim(); ++d)
    TORCH_SYM_CHECK(grad_output.sym_size(d).sym_eq(input.sym_size(d)), "grad_output should have size ",
                    input.sym_sizes(), " not ", grad_output.sym_sizes());
  TORCH_CHECK(grad_output.scalar_type() == input.scalar_type(), "expected scalar type ", input.scalar_type(),
              " but found ", grad_output.scalar_type());
  TORCH_CHECK(stats.dim() == 2 && stats.scalar_type() == at::kDouble,
              "stats should have 2 dims of scalar type Double, not ", stats.dim(), " of ", stats.scalar_type());
  TORCH_SYM_CHECK(stats.sym_size(0).sym_eq(2), "stats should have 2 rows not ", stats.sym_size(0));
  TORCH_SYM_CHECK(stats.sym_size(1).sym_eq(input.sym_size(1)), "stats should contain ", input.sym_size(1),
                  " elements a row not ", stats.sym_size(1));
}

void check_statistics_need_no_grad(const std::optional<at::Tensor>& running_mean,
                                   const std::optional<at::Tensor>& running_var) {
  check_no_grad("running_mean", running_mean);
  check_no_grad("running_var", running_var);
}

}  // namespace torch_bn::ops
