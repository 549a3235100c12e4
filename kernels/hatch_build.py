"""Build hook: compile the CPU engine. The package works without it, so a failure is only told."""

from __future__ import annotations

import runpy
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NATIVE = "dgq_kernels/native"


class EngineBuildHook(BuildHookInterface):
    """Compiles the library: into the source tree for an editable install, from a folder of its own for a wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called before a wheel or an editable install is put together."""
        script = runpy.run_path(str(Path(self.root) / "kernels" / NATIVE / "build.py"))
        self.folder = tempfile.TemporaryDirectory()
        library = script["LIBRARY"]
        if version != "editable":  # a wheel may be for another machine than the tree is used on
            library = Path(self.folder.name, library.name)
        try:
            script["build"](library)
        except RuntimeError as failure:
            library.unlink(missing_ok=True)  # one left from before may be older than its source
            self.app.display_warning(f"the CPU engine was not built, torch's integer products serve instead: {failure}")
            return
        if version != "editable":
            build_data["force_include"][str(library)] = f"{NATIVE}/{library.name}"
        # The library is tied to the platform, not to a version of Python. Cross builds name the platform in Python's
        # own variable, _PYTHON_HOST_PLATFORM.
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Called when the wheel is there."""
        self.folder.cleanup()
