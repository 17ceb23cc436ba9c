#include "topology.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <fstream>
#include <sstream>

namespace {

std::vector<int> allowed_cpus() {
  cpu_set_t set;
  CPU_ZERO(&set);
  std::vector<int> cpus;
  if (sched_getaffinity(0, sizeof set, &set) != 0) return cpus;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
  }
  return cpus;
}

// "0-3,8,10-11", as the kernel writes lists. What is no list is empty.
std::vector<int> parse_list(const std::string& text) {
  std::vector<int> numbers;
  std::istringstream ranges(text);
  for (std::string range; std::getline(ranges, range, ',');) {
    std::istringstream ends(range);
    int first = -1, last = -1;
    char dash = 0;
    if (!(ends >> first) || first < 0) continue;
    if (!(ends >> dash >> last)) last = first;
    for (int i = first; i <= std::min(last, CPU_SETSIZE - 1); ++i) numbers.push_back(i);
  }
  return numbers;
}

struct Topology {
  Nodes nodes;
  std::vector<uint8_t> node_of;  // by CPU
  std::vector<int> node_of_worker;
  const Topology* replaced;  // never freed: a thread may be reading it

  explicit Topology(const Nodes& given, const Topology* before = nullptr) : nodes(given), replaced(before) {
    if (nodes.empty()) nodes.push_back({});
    size_t most = 0;
    for (size_t node = 0; node < nodes.size(); ++node) {
      for (const int cpu : nodes[node]) {
        if (cpu < 0 || cpu >= CPU_SETSIZE) continue;
        if (node_of.size() <= (size_t)cpu) node_of.resize((size_t)cpu + 1, 0);
        node_of[(size_t)cpu] = (uint8_t)(node % kMaxNodes);
      }
      most = std::max(most, nodes[node].size());
    }
    for (size_t i = 0; i < most; ++i) {
      for (size_t node = 0; node < nodes.size(); ++node) {
        if (i < nodes[node].size()) node_of_worker.push_back((int)node);
      }
    }
  }
};

// Replaced by tests only.
std::atomic<const Topology*> in_use{nullptr};

const Topology& topology() {
  const Topology* found = in_use.load(std::memory_order_acquire);
  if (found) return *found;
  const Topology* made = new Topology(read_nodes("/sys/devices/system/node"));
  if (in_use.compare_exchange_strong(found, made)) return *made;
  delete made;
  return *found;
}

}  // namespace

Nodes read_nodes(const std::string& root) {
  const std::vector<int> allowed = allowed_cpus();
  std::string online;
  std::getline(std::ifstream(root + "/online"), online);
  Nodes found;
  for (const int node : parse_list(online)) {
    std::string list;
    std::getline(std::ifstream(root + "/node" + std::to_string(node) + "/cpulist"), list);
    std::vector<int> cpus;
    for (const int cpu : parse_list(list)) {
      if (std::binary_search(allowed.begin(), allowed.end(), cpu)) cpus.push_back(cpu);
    }
    if (!cpus.empty()) found.push_back(cpus);
  }
  if (found.size() < 2) return {allowed};
  return found;
}

Nodes nodes() { return topology().nodes; }
void set_nodes(const Nodes& nodes) {
  const Nodes wanted = nodes.empty() ? read_nodes("/sys/devices/system/node") : nodes;
  in_use.store(new Topology(wanted, in_use.load()), std::memory_order_release);
}

int num_nodes() { return (int)std::min<size_t>(topology().nodes.size(), kMaxNodes); }

int this_node() {
  const Topology& t = topology();
  if (t.nodes.size() < 2) return 0;
  const int cpu = sched_getcpu();
  return cpu >= 0 && (size_t)cpu < t.node_of.size() ? t.node_of[(size_t)cpu] : 0;
}

void stay_on_node(int id) {
  static thread_local const Topology* obeyed = nullptr;
  const Topology& t = topology();
  if (obeyed == &t || (!obeyed && t.nodes.size() < 2)) return;
  obeyed = &t;
  if (t.node_of_worker.empty()) return;
  cpu_set_t set;
  CPU_ZERO(&set);
  for (const int cpu : t.nodes[(size_t)t.node_of_worker[(size_t)id % t.node_of_worker.size()]]) {
    if (cpu >= 0 && cpu < CPU_SETSIZE) CPU_SET(cpu, &set);
  }
  pthread_setaffinity_np(pthread_self(), sizeof set, &set);  // refused: slower, same bits
}
