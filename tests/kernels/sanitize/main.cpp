// Runs every operation under every instruction set of this machine, with one and with many threads, from two callers at
// once, in a child after fork, and at exit: the sanitizers watch (make sanitize), and results must be equal to the bit.
#include <sys/wait.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <string>
#include <thread>

#include "check.h"
#include "cpu_features.h"
#include "thread_pool.h"

namespace {

Outputs everything(bool naive) {
  Outputs outputs(naive);
  check_packing(outputs);
  check_linear(outputs);
  check_moe(outputs);
  check_attention(outputs);
  check_rows(outputs);
  check_router(outputs);
  check_step(outputs);
  check_sampling(outputs);
  check_checksums(outputs);
  return outputs;
}

void expect_same(const char* what, const Outputs& expected) {
  if (!(everything(false) == expected)) fail(what, 0, 1);
}

void two_callers_while_the_pool_is_resized(const Outputs& expected) {
  std::atomic<bool> ended{false};
  std::thread resizer([&] {
    for (int count = 1; !ended; count = count % 6 + 1) {
      set_num_threads(count);
      std::this_thread::sleep_for(std::chrono::microseconds(200));
    }
  });
  std::thread other([&] { expect_same("second caller", expected); });
  expect_same("first caller", expected);
  other.join();
  ended = true;
  resizer.join();
}

void child_after_fork(const Outputs& expected) {
  set_num_threads(3);
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    expect_same("child", expected);
    _exit(0);
  }
  int status = -1;
  waitpid(child, &status, 0);
  if (status != 0) fail("status of the child after fork", status, 0);
  expect_same("parent after fork", expected);
}

void leave_a_thread_at_work() {
  const auto started = std::make_shared<std::atomic<bool>>(false);
  std::thread([started] {
    for (;;) {
      *started = true;
      everything(false);
    }
  }).detach();
  while (!*started) std::this_thread::yield();
}

}  // namespace

int main() {
  check_slices();
  for (const std::string& isa : supported_isas()) {
    select_isa(isa);
    set_num_threads(1);
    const Outputs expected = everything(true);
    set_num_threads(4);
    expect_same("more threads", expected);
    set_nodes({{0}, {1}, {0, 1}});
    expect_same("pretended memory nodes", expected);
    set_nodes({});
    check_refusals();
    two_callers_while_the_pool_is_resized(expected);
    child_after_fork(expected);
    std::printf("%s: %lld bytes of results, the same in every way\n", isa.c_str(), (long long)expected.size());
  }
  leave_a_thread_at_work();
  return 0;
}
