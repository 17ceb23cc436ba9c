#include "cpu_quota.h"

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <sstream>

namespace {

// CPUs' worth of time one group allows, or 0 for no limit. v2: "max 100000" or "150000 100000"; v1: two files.
double quota_in(const std::string& folder) {
  std::string quota;
  double period = 0;
  if (std::ifstream v2(folder + "/cpu.max"); v2 >> quota >> period && quota != "max" && period > 0) {
    return std::atof(quota.c_str()) / period;
  }
  double microseconds = 0;
  std::ifstream v1_quota(folder + "/cpu.cfs_quota_us"), v1_period(folder + "/cpu.cfs_period_us");
  if (v1_quota >> microseconds && v1_period >> period && microseconds > 0 && period > 0) return microseconds / period;
  return 0;
}

}  // namespace

double cgroup_cpus(const std::string& groups_file, const std::string& root) {
  double limit = 0;
  std::ifstream groups(groups_file);
  for (std::string line; std::getline(groups, line);) {
    std::istringstream fields(line);
    std::string id, controllers, path;
    std::getline(fields, id, ':');
    std::getline(fields, controllers, ':');
    std::getline(fields, path);
    std::string mount;
    if (controllers.empty()) mount = root;
    else if (("," + controllers + ",").find(",cpu,") != std::string::npos) mount = root + "/cpu";
    else continue;
    for (;;) {
      const double here = quota_in(mount + path);
      if (here > 0) limit = limit > 0 ? std::min(limit, here) : here;
      if (path.empty()) break;
      path.resize(path.find_last_of('/') == std::string::npos ? 0 : path.find_last_of('/'));
    }
  }
  return limit;
}
