// Memory nodes (NUMA): which CPUs are near which memory, so that threads read the slice of a weight that lies near them.
//
// The rule is one for all: a packed matrix is cut into as many slices of panels as there are nodes, the first for the
// first node. Packing writes a slice by threads of its node, which is what makes the system put its pages there (first
// touch); kernels read it by threads of its node as long as these keep up (SlicedStage). On one node nothing changes.
// Huge pages blur the border between slices by 2 MB, and pages of a mapped file lie where they were first read.
#pragma once
#include <string>
#include <vector>

typedef std::vector<std::vector<int>> Nodes;  // CPUs of each node

constexpr int kMaxNodes = 16;  // more are folded together

// root: /sys/devices/system/node. Only CPUs this process may run on, and nodes that have one; one node if in doubt.
Nodes read_nodes(const std::string& root);

// The nodes in use: this machine's, unless a test pretends others. set_nodes({}) goes back to this machine's.
Nodes nodes();
void set_nodes(const Nodes& nodes);

int num_nodes();
// The node of the CPU this thread is on right now; 0 if unknown.
int this_node();
// Makes the calling thread, worker `id` of the pool, stay on its node: workers are dealt out to the nodes in turn, as
// far as each has CPUs. Cheap when nothing changed since this thread's last call.
void stay_on_node(int id);
