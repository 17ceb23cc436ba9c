// What the bindings*.cpp share: they alone know Python.
#pragma once
#include <pybind11/pybind11.h>
#include <unistd.h>

namespace py = pybind11;

typedef uintptr_t Address;
inline const float* floats(Address a) { return reinterpret_cast<const float*>(a); }
inline float* floats_out(Address a) { return reinterpret_cast<float*>(a); }
inline const int32_t* ints(Address a) { return reinterpret_cast<const int32_t*>(a); }
inline const char* bytes(Address a) { return reinterpret_cast<const char*>(a); }
inline char* bytes_out(Address a) { return reinterpret_cast<char*>(a); }

// Lets other Python threads run meanwhile. As py::gil_scoped_release, but for this: a daemon thread that comes back
// from a kernel while the interpreter shuts down is told to end by an unwinding that Python starts in
// PyEval_RestoreThread, and unwinding through C++ would abort the process. Such a thread sleeps until the process ends.
class NoGil {
 public:
  NoGil() : state_(PyEval_SaveThread()) {}
  NoGil(const NoGil&) = delete;
  ~NoGil() noexcept(false) {
    try {
      PyEval_RestoreThread(state_);
    } catch (...) {
      for (;;) pause();
    }
  }

 private:
  PyThreadState* state_;
};

void bind_step(py::module_& m);  // bindings_step.cpp
