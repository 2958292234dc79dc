"""The parser that every command shares: defaults in the help, mistakes in one line."""

import argparse
from pathlib import Path
from typing import NoReturn

from kvtier.errors import ConfigError, one_line

CONFIG_HELP = "a TOML file of settings, see docs/config.md (default: none, so all defaults)"
ACCESS_HELP = "a TOML file whose [tls] and [auth] say how to connect (default: none, plain)"
JSON_HELP = "write every figure there (default: none)"
PLOT_HELP = "draw the figures there; needs the extra `plot` (default: none)"
EXIT_CODES = """exit status:
  0    done
  1    done, and the answer is no: a block is damaged, a cluster is not settled, a promise is broken
  2    not done: a mistake in the command, the settings or the surroundings, named in one line
  130  interrupted (Ctrl-C); 128 + N: ended by signal N"""


class _Help(argparse.RawDescriptionHelpFormatter):
    """Ends the text of each option that has a value with its default, unless it tells it itself."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help
        if text is None or not takes_value(action) or "default: " in text:
            return text
        return f"{text} (required)" if action.required else f"{text} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """An argument parser in the manner of this command line; its subparsers are of it too.

    Options must be written out: an abbreviation would turn ambiguous with the next option.
    """

    def __init__(self, **settings: object) -> None:
        given = {"formatter_class": _Help, "allow_abbrev": False, **settings}
        super().__init__(**given)  # type: ignore[arg-type]  # as argparse passes them on

    def error(self, message: str) -> NoReturn:
        """End with status 2 and one line."""
        self.exit(2, f"{self.prog}: {one_line(message)}; see `{self.prog} --help`\n")


def takes_value(action: argparse.Action) -> bool:
    """Whether it is an option with a value: no flag, and no bare argument."""
    return bool(action.option_strings) and action.nargs != 0


def check_outputs(options: argparse.Namespace) -> None:
    """See before the work, not after it, that `--json` and `--plot` can be written.

    Raises:
        ConfigError: There is no such folder, or pictures are not drawn in that format.
    """
    for flag in ("json", "plot"):
        given = getattr(options, flag, None)
        if given is None:
            continue
        path = Path(given)
        if not path.parent.is_dir():
            raise ConfigError(f"--{flag} {path}: there is no folder {path.parent}")
        if path.is_dir():
            raise ConfigError(f"--{flag} {path}: is a folder")
        if flag == "plot":
            from matplotlib.backend_bases import FigureCanvasBase

            known = FigureCanvasBase.get_supported_filetypes()
            if path.suffix[1:].lower() not in known:
                raise ConfigError(f"--plot {path}: must end in one of .{', .'.join(sorted(known))}")
