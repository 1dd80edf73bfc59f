#!/usr/bin/env bash
# Usage: lint.sh check|format. Formatters and linters of .venv over everything that git would track.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=.venv/bin
list() { git ls-files -z --cached --others --exclude-standard -- "$@"; }
native=('*.c' '*.h' '*.cpp' '*.cu' '*.cuh')

if [[ $1 == format ]]; then
  list "${native[@]}" | xargs -0 "$bin/clang-format" -i
  "$bin/ruff" check --fix --quiet
  "$bin/ruff" format
  exit
fi
failed=0
echo "== clang-format =="
list "${native[@]}" | xargs -0 "$bin/clang-format" --dry-run --Werror || failed=1
echo "== ruff =="
"$bin/ruff" format --check || failed=1
"$bin/ruff" check || failed=1
echo "== clang-tidy =="
sed -nE 's/^ *"file": "(.*)",?$/\1/p' build/lint/compile_commands.json | sort -u | tr '\n' '\0' |
  xargs -0 -n 1 -P "$(nproc)" "$bin/clang-tidy" --quiet -p build/lint \
    2> >(grep -vE '^[0-9]+ warnings? generated\.$|^Suppressed [0-9]+ warnings' >&2) || failed=1 # not what it left out
exit $failed
