"""Build hook: compile the CPU engine. The package works without it, so a failure is only told."""

from __future__ import annotations

import runpy
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class EngineBuildHook(BuildHookInterface):
    """Compiles the library into the source tree, from where wheels and editable installs take it."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called before a wheel or an editable install is put together."""
        script = runpy.run_path(str(Path(self.root) / "kernels" / "dgq_kernels" / "native" / "build.py"))
        try:
            script["build"]()
        except RuntimeError as failure:
            script["LIBRARY"].unlink(missing_ok=True)  # one left from before may be older than its source
            self.app.display_warning(f"the CPU engine was not built, torch's integer products serve instead: {failure}")
            return
        # the library is tied to the platform, not to a version of Python
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
