#!/bin/bash
# Run tests of the native operators' NEON version on an x86 machine, with an ARM Python in QEMU.
#
#   tests/kernels/emulate_arm.sh FOLDER tests/kernels/test_linear.py [pytest options]
#
# Debian or Ubuntu: first `apt-get install g++-aarch64-linux-gnu qemu-user-static`. FOLDER receives about 4 GB: Debian's
# Python 3.11 for arm64, and PyTorch's aarch64 wheel, which loads the CUDA libraries that it names. Nothing else on the
# machine changes. The cross compiler builds; QEMU takes minutes per test file.
set -euo pipefail
mkdir -p "$1" && folder=$(cd "$1" && pwd) && shift
python=${PYTHON:-.venv/bin/python}
root=$folder/root site=$folder/site

if [ ! -e "$folder/.python" ]; then
  apt=$folder/apt
  mkdir -p "$apt"/{lists/partial,cache/archives/partial} "$root"
  : >"$apt/status"
  cat >"$apt/conf" <<END
APT::Architecture "arm64";
APT::Architectures { "arm64"; };
APT::Sandbox::User "root";
Debug::NoLocking "true";
Dir::State "$apt";
Dir::State::status "$apt/status";
Dir::Cache "$apt/cache";
Dir::Etc::sourcelist "$apt/sources";
Dir::Etc::sourceparts "/dev/null";
END
  # The mirror is this machine's own.
  mirror=${DEBIAN_MIRROR:-$(apt-get indextargets --format '$(SITE)' "Created-By: Packages" | head -n 1)}
  key=/usr/share/keyrings/debian-archive-keyring.gpg
  echo "deb [signed-by=$key] $mirror bookworm main" >"$apt/sources"
  export APT_CONFIG=$apt/conf
  apt-get -q update
  apt-get -q install -y --no-install-recommends --download-only python3.11 libstdc++6 libgomp1
  for package in "$apt"/cache/archives/*.deb; do dpkg -x "$package" "$root"; done
  # QEMU shows the processor of the host. PyTorch and oneDNN read these files, and crash without those of an ARM one.
  mkdir -p "$root/proc"
  for cpu in 0 1; do
    registers=$root/sys/devices/system/cpu/cpu$cpu/regs/identification
    mkdir -p "$registers"
    echo 0x00000000413fd0c1 >"$registers/midr_el1"
    printf '%s\t: %s\n' processor $cpu Features "fp asimd aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm" \
      "CPU implementer" 0x41 "CPU architecture" 8 "CPU variant" 0x3 "CPU part" 0xd0c "CPU revision" 1
    echo
  done >"$root/proc/cpuinfo"
  touch "$folder/.python"
fi

if [ ! -e "$folder/.site" ]; then
  install=("$python" -m pip install --quiet --target "$site" --python-version 3.11 --only-binary=:all:)
  for glibc in 2_28 2_27 2_26 2_25 2_24 2_17; do install+=(--platform "manylinux_${glibc}_aarch64"); done
  install+=(--platform manylinux2014_aarch64)
  torch=$("$python" -c 'import importlib.metadata as m; print(m.version("torch").partition("+")[0])')
  cuda=(cublas cuda-cupti cuda-nvrtc cuda-runtime cufft cufile curand cusolver cusparse nvjitlink nvtx)
  # One command for each set of packages that share the folder `nvidia`: pip does not merge folders of two commands.
  "${install[@]}" --no-deps "torch==$torch" nvidia-{cudnn,cusparselt,nccl,nvshmem}-cu13 "${cuda[@]/#/nvidia-}"
  "${install[@]}" numpy safetensors pyyaml tokenizers pytest pytest-timeout hypothesis \
    filelock typing-extensions sympy networkx jinja2 fsspec setuptools
  touch "$folder/.site"
fi

export PYTHONPATH=$site PYTHONDONTWRITEBYTECODE=1 PYTHONNOUSERSITE=1 XDG_CACHE_HOME=$folder/cache
arm_python=(qemu-aarch64-static -cpu neoverse-n1 -L "$root" "$root/usr/bin/python3.11")
CXX=$(command -v aarch64-linux-gnu-g++) "${arm_python[@]}" -m kernels.native.build
"${arm_python[@]}" -m pytest -p no:cacheprovider --timeout 0 "$@"
