#!/usr/bin/env bash
# Usage: debian_packages.sh demo|test PYTHON. Installs the Debian packages that are missing as root, else names them.
set -euo pipefail
purpose=$1 python=$2
missing=()
need() { # need PACKAGE COMMAND...: the package is missing where the command fails
  local package=$1
  shift
  "$@" >/dev/null 2>&1 || missing+=("$package")
}
at_least_cmake_3_25() { cmake --version | awk 'NR == 1 { split($3, v, "."); exit !(v[1] > 3 || v[1] == 3 && v[2] >= 25) }'; }
has_python_headers() { "$python" -c 'import os, sysconfig; assert os.path.isfile(sysconfig.get_path("include") + "/Python.h")'; }

need cmake at_least_cmake_3_25
need g++ command -v c++
need python3 command -v "$python"
# Another Python than Debian's has to bring these itself.
[[ $(command -v "$python") == /usr/bin/* ]] && debian_python=1 || debian_python=0
if ((debian_python)); then need python3-venv "$python" -c 'import ensurepip'; fi
if [[ $purpose == test ]]; then
  need libgtest-dev test -e /usr/include/gtest/gtest.h
  need pkg-config command -v pkg-config
  # torch.compile builds against Python.h.
  if ((debian_python)); then need python3-dev has_python_headers; fi
fi
((${#missing[@]})) || exit 0

if [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
  echo "Installing Debian packages: ${missing[*]}"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${missing[@]}" >/dev/null
else
  echo "Missing Debian packages: ${missing[*]}" >&2
  echo "Run: sudo apt-get update && sudo apt-get install ${missing[*]}" >&2
  exit 1
fi
