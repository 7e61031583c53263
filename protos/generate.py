"""Generates the Python stubs of every proto into client/ (or the folder given as first argument).

The stubs are committed; a test regenerates them and compares. Generated with the oldest supported grpcio-tools,
because newer gencode refuses older runtimes. Knows nothing of what the protos mean.
"""

import sys
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent


def generate(out: Path) -> None:
    """Writes `*_pb2.py`, `*_pb2.pyi`, `*_pb2_grpc.py` and `*_pb2_grpc.pyi` of all protos below `out`."""
    protos = sorted(str(path) for path in ROOT.glob("treadle/**/*.proto"))
    # Beside the interpreter, not on the PATH: nobody need activate the environment.
    mypy_plugin = Path(sys.executable).with_name("protoc-gen-mypy_grpc")
    arguments = ["protoc", f"-I{ROOT}", f"-I{protoc_include()}", f"--plugin=protoc-gen-mypy_grpc={mypy_plugin}"]
    arguments += [f"--{plugin}_out={out}" for plugin in ("python", "pyi", "grpc_python", "mypy_grpc")]
    if protoc.main([*arguments, *protos]) != 0:
        raise SystemExit("protoc failed")
    for package in ("treadle/v1", "treadle/internal", "treadle/internal/v1"):
        (out / package / "__init__.py").write_text('"""Generated stubs; see protos/generate.py."""\n')


def protoc_include() -> str:
    """Returns the folder of the well-known types that grpcio-tools ships."""
    return str(Path(protoc.__file__).parent / "_proto")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT.parent / "client")
