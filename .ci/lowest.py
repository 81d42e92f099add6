# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Prints the lowest version of each package that ``pyproject.toml`` declares, as constraints for pip."""

import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
declared = [project["dependencies"], *project["optional-dependencies"].values()]
for requirement in sorted({requirement for group in declared for requirement in group if ">=" in requirement}):
    print(requirement.replace(">=", "=="))
