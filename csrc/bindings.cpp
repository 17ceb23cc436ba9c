// The only file that knows Python: a table of functions.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_C, m) {
  m.doc() = "moe_runtime CPU kernels";
  m.def("add", [](int a, int b) { return a + b; });
}
