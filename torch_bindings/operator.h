// How a function becomes the kernel of an operator. What holds for every operator is done here, once, from its schema:
// tensor arguments are checked, and those that the schema says are written have their version counters raised.
#pragma once

#include <cstddef>
#include <optional>
#include <string_view>
#include <type_traits>
#include <utility>

#include "shim.h"

namespace sluice {

// Throws std::invalid_argument unless it is a strided tensor of a dtype that torch's stable ABI knows.
void check_tensor(std::string_view name, const Tensor &tensor);

// Throws for an operator that has no kernel for its arguments: the first tensor argument that is to blame is named.
void refuse_device(std::string_view name, const Tensor &tensor, bool on_cuda);
[[noreturn]] void refuse_arguments(std::string_view schema, bool on_cuda);

// Raises the version counter by one, as torch's own in-place operators do in their ADInplaceOrView kernels, which the
// stable ABI cannot supply. Autograd then finds a tensor that it saved and that was written since.
void count_write(const Tensor &tensor);

namespace schema {

struct Argument {
  std::string_view name;
  bool is_written;
};

// Argument number index of "op(Type name, Type(a!) name = default, ...) -> ...".
constexpr Argument argument(std::string_view text, size_t index) {
  size_t begin = text.find('(') + 1, end = begin;
  for (int depth = 0;; ++end) {
    bool is_last = depth == 0 && text[end] == ')';
    if (is_last || (depth == 0 && text[end] == ',')) {
      if (is_last || index == 0) break;
      --index, begin = end + 1;
    }
    depth += (text[end] == '(' || text[end] == '[') - (text[end] == ')' || text[end] == ']');
  }
  std::string_view declaration = text.substr(begin, end - begin);
  declaration = declaration.substr(0, declaration.find('='));
  while (declaration.ends_with(' ')) declaration.remove_suffix(1);
  return {declaration.substr(declaration.rfind(' ') + 1), declaration.find('!') != declaration.npos};
}

static_assert(argument("f(Tensor(a!) x, Tensor(b!)? y, int[2] z = 1) -> Tensor", 0).name == "x");
static_assert(argument("f(Tensor(a!) x, Tensor(b!)? y, int[2] z = 1) -> Tensor", 1).name == "y");
static_assert(argument("f(Tensor(a!) x, Tensor(b!)? y, int[2] z = 1) -> Tensor", 1).is_written);
static_assert(argument("f(Tensor(a!) x, Tensor(b!)? y, int[2] z = 1) -> Tensor", 2).name == "z");
static_assert(!argument("f(Tensor(a!) x, Tensor(b!)? y, int[2] z = 1) -> Tensor", 2).is_written);

}  // namespace schema

// Calls visit(name, tensor) for an argument that is a tensor and is there. An optional one that holds no tensor, as C++
// callers may give, becomes an absent one.
template <typename Argument, typename Visit>
void visit_tensor(std::string_view name, Argument &argument, Visit &&visit) {
  if constexpr (std::is_same_v<Argument, Tensor>) {
    visit(name, argument);
  } else if constexpr (std::is_same_v<Argument, std::optional<Tensor>>) {
    if (argument && !argument->defined()) argument.reset();
    if (argument) visit(name, *argument);
  }
}

template <typename Source, auto function>
struct Operator;

// Source::schema() is the operator's schema, whose arguments are those of the function.
template <typename Source, typename Result, typename... Arguments, Result (*function)(Arguments...)>
struct Operator<Source, function> {
  static Result call(Arguments... arguments) {
    visit_all([](std::string_view name, const Tensor &tensor) { check_tensor(name, tensor); }, arguments...);
    Result result = function(arguments...);
    count_writes(std::index_sequence_for<Arguments...>(), arguments...);
    return result;
  }

  // The kernel for tensors of other kinds, and for no tensors at all.
  template <bool on_cuda>
  static Result refuse(Arguments... arguments) {
    visit_all([](std::string_view name, const Tensor &tensor) { check_tensor(name, tensor); }, arguments...);
    visit_all([](std::string_view name, const Tensor &tensor) { refuse_device(name, tensor, on_cuda); }, arguments...);
    refuse_arguments(Source::schema(), on_cuda);
  }

 private:
  template <typename Visit>
  static void visit_all(Visit visit, Arguments &...arguments) {
    size_t index = 0;
    (visit_tensor(schema::argument(Source::schema(), index++).name, arguments, visit), ...);
  }

  template <size_t... index>
  static void count_writes(std::index_sequence<index...>, Arguments &...arguments) {
    (count_write_if<schema::argument(Source::schema(), index).is_written>(arguments), ...);
  }

  template <bool is_written, typename Argument>
  static void count_write_if(Argument &argument) {
    if constexpr (is_written) {
      visit_tensor({}, argument, [](std::string_view, const Tensor &tensor) { count_write(tensor); });
    }
  }
};

using Boxed = void(StableIValue *, uint64_t, uint64_t);

template <typename Source, auto function>
void implement(torch::stable::detail::StableLibrary &library) {
  constexpr std::string_view schema = Source::schema();
  using Kernel = Operator<Source, function>;
  library.impl(std::string(schema.substr(0, schema.find('('))).c_str(), TORCH_BOX(&Kernel::call));
}

template <typename Source, auto function, bool on_cuda>
void refuse(torch::stable::detail::StableLibrary &library) {
  constexpr std::string_view schema = Source::schema();
  constexpr auto kernel = &Operator<Source, function>::template refuse<on_cuda>;
  library.impl(std::string(schema.substr(0, schema.find('('))).c_str(), TORCH_BOX(kernel));
}

}  // namespace sluice

// In a STABLE_TORCH_LIBRARY_IMPL(sluice, <device>, library): function is the kernel of the operator with this schema.
#define SLUICE_IMPLEMENT(SCHEMA, function)                          \
  do {                                                              \
    struct Source {                                                 \
      static constexpr std::string_view schema() { return SCHEMA; } \
    };                                                              \
    sluice::implement<Source, &function>(library);                  \
  } while (false)

// A block in which library registers what is asked for tensors of kinds without a kernel: other devices, sparse,
// quantised and nested tensors, and calls without any tensor.
#define SLUICE_ELSEWHERE(library)                                                                          \
  static void refuse_elsewhere(torch::stable::detail::StableLibrary &);                                    \
  STABLE_TORCH_LIBRARY_IMPL(sluice, CompositeExplicitAutograd, elsewhere) { refuse_elsewhere(elsewhere); } \
  STABLE_TORCH_LIBRARY_IMPL(sluice, AutogradNestedTensor, elsewhere) { refuse_elsewhere(elsewhere); }      \
  static void refuse_elsewhere(torch::stable::detail::StableLibrary &library)

// In a SLUICE_ELSEWHERE(library) block: the operator with this schema says what it takes. on_cuda: it has a kernel for
// CUDA where Sluice is built with CUDA.
#define SLUICE_REFUSE(SCHEMA, function, on_cuda)                    \
  do {                                                              \
    struct Source {                                                 \
      static constexpr std::string_view schema() { return SCHEMA; } \
    };                                                              \
    sluice::refuse<Source, &function, on_cuda>(library);            \
  } while (false)
