// What stands in compiled layers as operators, without a detour by the interpreter, which takes a
// third of a millisecond a layer. Called by graphs of torch.compile; registered when loaded, by
// operators.py, for what flat.py and packing.py define. Against torch's stable ABI.

#include "attention.h"
#include "linear.h"

#include <cmath>
#include <optional>
#include <vector>

#include <torch/csrc/inductor/aoti_torch/c/shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The stream that a pass runs over, on the thread that runs it.
thread_local decltype(&rayreward_attention) kernel = nullptr;
thread_local Layout* current = nullptr;

// For weights in panels; null where there are none.
decltype(&rayreward_linear) by_panels = nullptr;

Tensor dense(const Tensor& tensor) {
    return tensor.stride(3) == 1 ? tensor : torch::stable::contiguous(tensor);
}

// (1, heads, T, D) and so on to (1, T, heads, E); angles are (1, 1, T, D).
Tensor attention(Tensor queries, Tensor keys, Tensor values, std::optional<Tensor> cosines,
                 std::optional<Tensor> sines, std::optional<double> scaling,
                 std::optional<int64_t> window, std::optional<double> softcap, bool causal) {
    STD_TORCH_CHECK(current, "attention was called outside of a pass over a stream");
    STD_TORCH_CHECK(causal == (current->causal != 0),
                    "the stream was laid out for attention of the other kind");
    const bool is_bfloat16 = queries.scalar_type() == ScalarType::BFloat16;
    STD_TORCH_CHECK(is_bfloat16 || queries.scalar_type() == ScalarType::Float,
                    "the compiled kernel computes in float32 and bfloat16 only");
    queries = dense(queries), keys = dense(keys), values = dense(values);
    const int64_t heads = queries.size(1), tokens = queries.size(2), depth = queries.size(3);
    const int64_t kv_heads = keys.size(1), value_depth = values.size(3);
    Tensor results = torch::stable::new_empty(queries, {1, tokens, heads, value_depth});
    const int64_t strides[] = {queries.stride(2), queries.stride(1), keys.stride(2),
                               keys.stride(1),    values.stride(2),  values.stride(1),
                               results.stride(1), results.stride(2)};
    Angles angles{};
    if (cosines && sines) {
        cosines = dense(*cosines), sines = dense(*sines);
        angles = {cosines->const_data_ptr(), sines->const_data_ptr(), cosines->stride(2),
                  sines->stride(2)};
    }
    kernel(is_bfloat16, queries.const_data_ptr(), keys.const_data_ptr(), values.const_data_ptr(),
           results.mutable_data_ptr(), strides, tokens, kv_heads, heads / kv_heads, depth,
           value_depth, angles.cosines ? &angles : nullptr, current,
           scaling.value_or(std::pow(double(depth), -0.5)), softcap.value_or(0),
           window.value_or(0), torch::stable::get_num_threads());
    ++current->calls;
    return results;
}

// (…, in) to (…, out), with a weight in panels.
Tensor linear_by_panels(Tensor rows, const Tensor& panels, const std::optional<Tensor>& bias) {
    STD_TORCH_CHECK(by_panels, "there is no kernel for weights in panels");
    const int64_t in = panels.size(1), out = panels.size(0) * panels.size(2);
    STD_TORCH_CHECK(rows.size(-1) == in, "rows are not as wide as the weight");
    const bool is_bfloat16 = panels.scalar_type() == ScalarType::BFloat16;
    STD_TORCH_CHECK(rows.scalar_type() == ScalarType::Float ||
                        (is_bfloat16 && rows.scalar_type() == ScalarType::BFloat16),
                    "rows are of another precision than the weight");
    rows = torch::stable::contiguous(rows);
    std::vector<int64_t> shape(rows.sizes().begin(), rows.sizes().end());
    shape.back() = out;
    Tensor results = torch::stable::new_empty(rows, shape);
    by_panels(rows.scalar_type() == ScalarType::BFloat16, is_bfloat16, rows.const_data_ptr(),
              panels.const_data_ptr(),
              bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr,
              results.mutable_data_ptr(), rows.numel() / in, out, in,
              torch::stable::get_num_threads());
    return results;
}

// The same, or with a weight in oneDNN's order.
Tensor linear(Tensor rows, Tensor weight, std::optional<Tensor> bias) {
    if (weight.dim() == 3) return linear_by_panels(rows, weight, bias);
    AtenTensorHandle held = bias ? bias->get() : nullptr, product;
    const char* algorithm = "";
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_cpu__linear_pointwise(rows.get(), weight.get(), bias ? &held : nullptr, "none",
                                         nullptr, 0, &algorithm, &product));
    return Tensor(product);
}

}  // namespace

// From now on streams are attended to by this layout on this thread; null for by none.
extern "C" void rayreward_enter(decltype(&rayreward_attention) with, Layout* layout) {
    kernel = with, current = layout;
}

// From now on weights in panels are multiplied by it, on all threads.
extern "C" void rayreward_multiply_by(decltype(&rayreward_linear) with) { by_panels = with; }

STABLE_TORCH_LIBRARY_IMPL(rayreward, CPU, library) {
    library.impl("attention", TORCH_BOX(&attention));
    library.impl("linear", TORCH_BOX(&linear));
}

STABLE_TORCH_LIBRARY_IMPL(rayreward, MkldnnCPU, library) {
    library.impl("linear", TORCH_BOX(&linear));
}
