"""The plug-in registers itself, costs nothing, and never breaks anybody's import."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import bitforbit
from integrations.conftest import Directories

# The package under test, installed or not.
SOURCE = Path(bitforbit.__file__).parents[1]


def run(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={
            **os.environ,
            "PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}:{SOURCE}",
            "HF_HUB_OFFLINE": "1",
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.strip()


def test_imports_the_standard_library_only() -> None:
    code = """
        import sys
        before = set(sys.modules)
        from bitforbit.integrations.autoload import autoload
        autoload()
        third_party = {name.partition(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names
        print(sorted(third_party))
    """
    assert run(code) == "['bitforbit']"


def test_registers_when_transformers_loads_its_quantizers() -> None:
    code = """
        import sys
        from bitforbit.integrations.autoload import autoload
        autoload(); autoload()
        assert sum(type(f).__module__ == "bitforbit.integrations.autoload" for f in sys.meta_path) == 1
        import transformers
        assert "bitforbit.integrations.transformers.register" not in sys.modules
        from transformers.quantizers import auto
        print(auto.AUTO_QUANTIZER_MAPPING["bitforbit"].__name__, auto.__loader__.__class__.__name__)
    """
    assert run(code) == "BitforbitQuantizer SourceFileLoader"


def test_registers_when_the_quantizers_are_there_already() -> None:
    code = """
        from transformers.quantizers import auto
        assert "bitforbit" not in auto.AUTO_QUANTIZER_MAPPING
        from bitforbit.integrations.autoload import autoload
        autoload()
        print("bitforbit" in auto.AUTO_QUANTIZER_MAPPING)
    """
    assert run(code, TORCH_DEVICE_BACKEND_AUTOLOAD="0") == "True"


@pytest.mark.parametrize("first", ["bitforbit", "transformers.quantizers.auto"])
def test_importing_the_package_is_enough(first: str) -> None:
    """Without an entry point (a source tree, PYTHONPATH), or with torch's autoload turned off."""
    code = f"""
        import {first}
        import bitforbit
        from transformers.quantizers import auto
        print("bitforbit" in auto.AUTO_QUANTIZER_MAPPING)
    """
    assert run(code, TORCH_DEVICE_BACKEND_AUTOLOAD="0") == "True"


def test_importing_the_config_registers() -> None:
    code = """
        import bitforbit
        bitforbit.BitforbitConfig
        from transformers.quantizers import auto
        print("bitforbit" in auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
    """
    assert run(code, TORCH_DEVICE_BACKEND_AUTOLOAD="0") == "True"


def test_a_broken_plugin_warns_and_transformers_still_loads() -> None:
    code = """
        import sys, warnings
        sys.modules["bitforbit.integrations.transformers.quantizer"] = None
        from bitforbit.integrations.autoload import autoload
        autoload()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            from transformers.quantizers import auto
        print(any("cannot be loaded" in str(w.message) for w in caught), "bitforbit" in auto.AUTO_QUANTIZER_MAPPING)
    """
    assert run(code, TORCH_DEVICE_BACKEND_AUTOLOAD="0") == "True False"


def test_a_library_that_is_not_installed_stays_not_installed() -> None:
    code = """
        from bitforbit.integrations import autoload
        autoload.PLUGINS["no_such_library.quantizers"] = "bitforbit.integrations.transformers.register"
        autoload.autoload()
        try:
            import no_such_library.quantizers
        except ModuleNotFoundError as e:
            print(e.name)
    """
    assert run(code) == "no_such_library"


def test_a_native_directory_loads_without_an_import_of_ours(directories: Directories) -> None:
    """The real thing: needs the package's entry point."""
    points = importlib.metadata.entry_points(group="torch.backends")
    if not any(point.value == "bitforbit.integrations.autoload:autoload" for point in points):
        pytest.skip("the package is not installed")
    _, native = directories("llama")
    code = f"""
        from transformers import AutoModelForCausalLM
        print(type(AutoModelForCausalLM.from_pretrained({str(native)!r}).lm_head).__module__)
    """
    assert run(code, TORCH_DEVICE_BACKEND_AUTOLOAD="1").startswith("bitforbit")
