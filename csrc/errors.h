// What the core throws; bindings.cpp turns them into moe_runtime.errors.
#pragma once
#include <stdexcept>

struct KernelFault : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct IsaMissing : std::runtime_error {
  using std::runtime_error::runtime_error;
};
