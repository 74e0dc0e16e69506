"""docs/api says what the docstrings of the newest stage say."""

from __future__ import annotations

from pathlib import Path

import pytest

from folovllm.bench import apidocs
from folovllm.stages import find_root, known_stages


def test_the_committed_pages_are_up_to_date() -> None:
    assert apidocs.out_of_date(find_root()) == [], f"run {apidocs.COMMAND}"


def test_what_a_stage_exports_is_on_the_pages() -> None:
    pages = apidocs.make_pages(find_root())
    newest = (find_root() / known_stages()[-1] / "__init__.py").read_text(encoding="utf-8")
    exported = newest.partition("__all__")[2]
    headings = {
        line.removeprefix("## class ") for page in pages.values() for line in page.splitlines() if line[:2] == "##"
    }
    assert {"LLM", "EngineConfig", "LLMEngine", "EngineStats"} <= headings
    assert {name for name in exported.split('"')[1::2]} <= headings


# ---- a small repository ----------------------------------------------------------------------------------------------

CONFIG = '''
"""Options, in one place."""

from dataclasses import dataclass, field
from enum import IntEnum


class Level(IntEnum):
    LOW = 1
    HIGH = 2


@dataclass(frozen=True)
class Config:
    """Options | choices.

    Attributes:
        first, second: of the same kind,
            said in two lines with <|end|>.
        many: which ones.

    Raises:
        ValueError: out of range.
    """

    first: int
    second: str | None = None
    many: list[int] = field(default_factory=list)

    @property
    def both(self) -> str:
        """Together."""

    def run(self, a_rather_long_name: dict[str, int], other: tuple[int, ...] = (), *, last_of_all: bool = True) -> int:
        """Do it.

        More about it.

        Args:
            a_rather_long_name: {name: count}.

        Returns:
            How many
            there were.
        """

    def _hidden(self) -> None:
        """Not for users."""


def helper() -> None:
    """Not a class."""
'''

PAGE = """# config

[Source](../../m0_x/config.py)

Options, in one place.

## class Level

| field | type | default | meaning |
|---|---|---|---|
| `LOW` |  |  |  |
| `HIGH` |  |  |  |

## class Config

Options | choices.

| field | type | default | meaning |
|---|---|---|---|
| `first` | `int` | – | of the same kind, said in two lines with &lt;\\|end\\|>. |
| `second` | `str \\| None` | `None` | of the same kind, said in two lines with &lt;\\|end\\|>. |
| `many` | `list[int]` | `list()` | which ones. |

**Raises**

- `ValueError`: out of range.

| property | type | meaning |
|---|---|---|
| `both` | `str` | Together. |

### Config.run

```python
Config.run(
    a_rather_long_name: dict[str, int],
    other: tuple[int, ...] = (),
    *,
    last_of_all: bool = True,
) -> int
```

Do it.

More about it.

**Args**

- `a_rather_long_name`: {name: count}.

**Returns**

- How many there were.
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    ledger = '[[stage]]\nname = "m0_x"\ntitle = "A title"\nidea = "An idea."\n'
    (tmp_path / "stages.toml").write_text(ledger, encoding="utf-8")
    (tmp_path / "m0_x").mkdir()
    (tmp_path / "m0_x" / "__init__.py").write_text("from .config import Config\n", encoding="utf-8")
    (tmp_path / "m0_x" / "config.py").write_text(CONFIG, encoding="utf-8")
    monkeypatch.setattr(apidocs, "find_root", lambda: tmp_path)
    return tmp_path


def test_a_page(root: Path) -> None:
    pages = apidocs.make_pages(root)
    assert pages["config.md"] == PAGE
    assert set(pages) == {"README.md", "config.md"}
    assert "| [config](config.md) | `Level`, `Config` | Options, in one place. |" in pages["README.md"]


def test_check_fails_until_the_pages_are_written(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = root / apidocs.FOLDER
    assert apidocs.main(["--check"]) == 1 and not folder.exists()
    assert "docs/api/config.md is out of date" in capsys.readouterr().err
    assert apidocs.main([]) == 0
    assert apidocs.main(["--check"]) == 0
    (folder / "gone.md").touch()  # of a module that was there once
    (folder / "config.md").write_text("edited", encoding="utf-8")
    assert apidocs.main(["--check"]) == 1
    assert apidocs.main([]) == 0
    assert not (folder / "gone.md").exists() and (folder / "config.md").read_text(encoding="utf-8") == PAGE
