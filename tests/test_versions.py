"""The commit that a measurement belongs to."""

import shutil
import subprocess
from pathlib import Path

import pytest

from triton_convbn import versions


def git(root: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", *identity, "-C", str(root), *arguments], check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository whose only source is the module under test."""
    monkeypatch.delenv("TRITON_CONVBN_COMMIT", raising=False)
    (tmp_path / "triton_convbn").mkdir()
    module = shutil.copy(versions.__file__, tmp_path / "triton_convbn" / "versions.py")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    monkeypatch.setattr(versions, "__file__", str(module))
    return tmp_path


def test_two_trees_that_differ_have_two_names(checkout: Path) -> None:
    """Resuming a benchmark takes rows of the same commit, so an edited tree is another one at every edit."""
    clean = versions.commit()
    assert "+" not in clean
    source = checkout / "triton_convbn" / "versions.py"
    found = {clean}
    for text in ("# one\n", "# two\n"):
        source.write_text(text)
        assert versions.commit() == versions.commit()
        found.add(versions.commit())
    (checkout / "triton_convbn" / "new.py").write_text("")
    found.add(versions.commit())
    assert len(found) == 4
    assert all(name.startswith(clean) for name in found)
    (checkout / "README.md").write_text("")
    assert versions.commit() in found


def test_another_repository_around_the_package_is_not_its_commit(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = checkout / "venv" / "site-packages" / "triton_convbn"
    installed.mkdir(parents=True)
    monkeypatch.setattr(versions, "__file__", str(installed / "versions.py"))
    assert versions.commit() == ""


def test_no_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_CONVBN_COMMIT", raising=False)
    monkeypatch.setattr(versions, "__file__", str(tmp_path / "triton_convbn" / "versions.py"))
    assert versions.commit() == ""
