#!/usr/bin/env bash
# Usage: test_abi.sh [pytest arguments]. Builds one wheel against the torch of .venv and runs the operator tests on that
# same file under torch 2.13, 2.11 and the newest, each in an environment under build/abi/; then the tests of the
# process groups, whose library is compiled there for that torch. Fetches several GB, once.
set -euo pipefail
cd "$(dirname "$0")/.."
abi=build/abi
mkdir -p "$abi"
export CMAKE_GENERATOR="${CMAKE_GENERATOR:-Unix Makefiles}" # as in the Makefile, which shares build/wheel
rm -f "$abi"/*.whl
.venv/bin/python -m pip -qq wheel --no-deps --no-build-isolation --config-settings=build-dir=build/wheel -w "$abi" .
wheel=$(echo "$abi"/*.whl)

# A cap on torch in pip's configuration would hide the newest, so pip runs without a configuration file here.
export PIP_CONFIG_FILE=/dev/null
newest=$(.venv/bin/python -m pip index versions torch 2>/dev/null | sed -nE 's/^torch \(([0-9.]+).*/\1/p')
failed=0
for version in 2.13.0 2.11.0 "$newest"; do
  environment=$abi/torch-$version
  echo "== torch $version: setting up $environment =="
  [[ -x $environment/bin/python ]] || .venv/bin/python -m venv "$environment"
  "$environment/bin/python" -m pip -qq install --constraint <(grep -v '^torch==' tools/constraints.txt) \
    "torch==$version" numpy pytest hypothesis torch-abi-audit transformers accelerate tensorboard expecttest
  "$environment/bin/python" -m pip -qq install --no-deps --force-reinstall "$wheel"
  echo "== torch $version =="
  "$environment/bin/python" - <<'PYTHON' || { failed=1; continue; }
import hashlib, pathlib, torch, torch_sluice
library = pathlib.Path(torch_sluice.library_path())
print(f"torch {torch.__version__}, CUDA build: {torch.version.cuda}, {library.name} sha256", end=" ")
print(hashlib.sha256(library.read_bytes()).hexdigest()[:16])
PYTHON
  "$environment/bin/python" -m pytest -q tests/ops tests/structure/test_{loading,abi}.py "$@" || failed=1
  export XDG_CACHE_HOME=$PWD/$abi/cache
  "$environment/bin/python" -c "from torch_sluice.parallel import backend; backend.load_library()" || failed=1
  "$environment/bin/python" -m pytest -q tests/parallel "$@" || failed=1
done
exit $failed
