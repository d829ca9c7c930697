"""Where torch.compile's default backend can work."""

import os
import shutil
import sysconfig
from pathlib import Path

import pytest

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++")))
    or not Path(sysconfig.get_path("include"), "Python.h").exists(),
    reason="inductor needs a C++ compiler, $CXX, g++ or clang++, and Python's headers",
)
