// How much processor time the machine's administrator gives this process, in CPUs.
#pragma once
#include <string>

// The tightest quota on the way from this process's control group to the root of each hierarchy that governs cpu
// time (cgroup v1 and v2), or 0 for none. groups_file: /proc/self/cgroup; root: /sys/fs/cgroup.
double cgroup_cpus(const std::string& groups_file, const std::string& root);
