# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""A state in one file: a zip archive with a member for each array, and one that describes them all.

The file is written under another name and renamed when it is complete. Every member has a checksum, which is compared when it is
read.
"""

import json
import os
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpyro.infer import SVI

from numpyro_ebm.train.checkpoint import newest_state
from numpyro_ebm.train.fingerprint import programs_of, require_same_programs
from numpyro_ebm.train.leaves import Leaf, bytes_of, checksum, is_spread, leaves_of, on_host, read_leaves, rebuilt, require_same

DESCRIPTION = "state.json"


def save(state: Any, path: str | os.PathLike[str], engine: Any = None) -> None:
    """Writes the state of a fit to one file, which :func:`load` reads.

    A file of this name is replaced when the new one is complete: whatever happens, there is the old one or the new one.

    :param state: of an engine of this package or of NumPyro's ``SVI``, or any other pytree of arrays.
    :param path: the file. Its folder must exist.
    :param engine: the engine whose state it is. The file then says of which programs it is, and :func:`load` refuses it for others,
        also where these have sites of the same names and shapes.
    :raises TypeError: for a leaf that holds no numbers, naming it.
    :raises OSError: if the file cannot be written.
    """
    path = Path(path).expanduser()
    described = [(leaf, on_host(numbers)) for leaf, numbers in leaves_of(state)]
    if spread := [leaf.path for leaf, numbers in described if is_spread(numbers)]:
        raise ValueError(
            f"the leaf {spread[0]} is spread over several processes, and save writes from one: use checkpoint=, or gather it by "
            "jax.experimental.multihost_utils.process_allgather(..., tiled=True)."
        )
    leaves = [leaf._replace(checksum=checksum(numbers)) for leaf, numbers in described]
    programs = None if engine is None else programs_of(engine)
    record = {"state": type(state).__name__, "leaves": leaves, "programs": programs}
    handle, unfinished = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            with zipfile.ZipFile(file, "w") as archive:
                archive.writestr(DESCRIPTION, json.dumps(record))
                for i, (_, numbers) in enumerate(described):
                    with archive.open(f"leaf_{i}", "w", force_zip64=True) as member:
                        member.write(bytes_of(numbers))
            file.flush()
            os.fsync(file.fileno())
        os.chmod(unfinished, 0o666 & ~_umask())  # mkstemp's is for the owner alone
        os.replace(unfinished, path)
    except BaseException:
        os.unlink(unfinished)
        raise


def load(path: str | os.PathLike[str], engine: Any, *args: Any, **kwargs: Any) -> Any:
    """Reads the state that :func:`save` has written, or the newest one in the folder of a run with ``checkpoint=``.

    ``run(..., init_state=load(...))`` goes on from it, with the same numbers as if it had not been saved.

    :param path: the file, or the folder.
    :param engine: an engine as the one whose state it is, freshly made or not. NumPyro's ``SVI`` is initialized, as its ``update``
        and ``get_params`` need it.
    :param args: what ``engine.init`` is called with after the key: arguments of the model.
    :raises ValueError: if it is the state of other programs, with each that differs; if it is one of arguments of other shapes,
        with both shapes of each leaf that differs; or if the file is damaged.
    """
    programs = programs_of(engine)
    path = Path(path).expanduser()
    key = jax.random.key(0)  # of which nothing is left in the state
    if isinstance(engine, SVI):  # which keeps what it learns of the model
        wanted = engine.init(key, *args, **kwargs)
    else:
        wanted = jax.eval_shape(lambda: engine.init(key, *args, **kwargs))
    if path.is_dir():
        return newest_state(path.absolute(), wanted, programs)
    try:
        with zipfile.ZipFile(path) as archive:
            record = json.loads(archive.read(DESCRIPTION))
            saved = read_leaves(record["leaves"])
            numbers = {leaf.path: _numbers(leaf, archive.read(f"leaf_{i}")) for i, leaf in enumerate(saved)}
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError) as error:
        raise ValueError(f"'{path}' is no file of save, or it is damaged: {error}.") from error
    fix = (
        f"Load it with the engine and the arguments of its fit. The file has a {record['state']}; this {type(engine).__name__} "
        f"makes a {type(wanted).__name__}."
    )
    require_same(f"'{path}'", fix, saved, wanted)
    if record.get("programs") is not None:
        require_same_programs(f"'{path}'", record["programs"], programs)
    elif programs.keys() != {"python"}:
        warnings.warn(
            f"'{path}' does not say of which model its state is: one whose sites have the same names and shapes would be taken for "
            "it. Write it with the engine of its fit, save(state, path, engine).",
            RuntimeWarning,
            stacklevel=2,
        )
    return rebuilt(saved, numbers, wanted)


def _numbers(leaf: Leaf, data: bytes) -> np.ndarray:
    numbers = np.frombuffer(bytearray(data), np.dtype(leaf.dtype)).reshape(leaf.shape)
    if checksum(numbers) != leaf.checksum:
        raise ValueError(f"the numbers of {leaf.path} are not those that were written (checksum)")
    return numbers


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
