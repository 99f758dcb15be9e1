"""Completion in the shell of the user, through the installed command."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent
TYPED = {
    "bash": {"COMP_WORDS": "fedmide ru", "COMP_CWORD": "1"},
    "zsh": {"_TYPER_COMPLETE_ARGS": "fedmide ru"},
    "fish": {"_TYPER_COMPLETE_ARGS": "fedmide ru", "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
}
"""The input of the command from each shell, if the tab key is pressed behind `fedmide ru`."""


def printed(home: Path, *command: str, **more: str) -> str:
    """The output of a command that has its own home folder. A failure of the test prints the reason."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("_TYPER")}
    environment = {**kept, "HOME": str(home), "PATH": f"{BIN}:{os.environ['PATH']}", **more}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("shell", TYPED)
def test_every_shell_has_a_script_and_completes_a_command(shell: str, tmp_path: Path) -> None:
    script = printed(tmp_path, "fedmide", _FEDMIDE_COMPLETE=f"source_{shell}")
    assert "_FEDMIDE_COMPLETE" in script and "fedmide" in script
    completed = printed(tmp_path, "fedmide", _FEDMIDE_COMPLETE=f"complete_{shell}", **TYPED[shell])
    assert "run" in completed and "sweep" not in completed


@pytest.mark.needs("bash")
def test_bash_completes_after_the_installation(tmp_path: Path) -> None:
    assert "_fedmide_completion" in printed(tmp_path, "bash", "-c", "fedmide --show-completion; true")
    printed(tmp_path, "bash", "-c", "fedmide --install-completion; true")
    typed = ". ~/.bashrc; COMP_WORDS=(fedmide data p); COMP_CWORD=2; _fedmide_completion fedmide; echo ${COMPREPLY[@]}"
    assert printed(tmp_path, "bash", "-c", typed) == "partition\n"
