"""Check whether training can run here: packages, operators, device, memory, disk, data, and how to get what is missing.

python -m tools.doctor
python -m tools.doctor data.name=modelnet40 data.root=/data --json
"""

import importlib
import json
import sys
from dataclasses import asdict

from pointewa.tools.installed import BAD, INSTALL, NOTE, OK, Finding, packages

# No other imports here: what this reports most often is a missing package.


def show(findings: list[Finding]) -> None:
    """Show the findings on one screen; in colour on a terminal, unless NO_COLOR is set."""
    fine = [one for one in findings if (one.group, one.state) == ("packages", OK)]
    rows = [(OK, "packages", ", ".join(f"{one.name} {one.found}" for one in fine), "")]
    rows += [(one.state, one.name, one.found, one.remedy) for one in findings if one not in fine]
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        for state, name, found, remedy in rows:
            print(f"{state:8}{name:23} {found}{remedy and f' -> {remedy}'}")
        return
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for _ in range(3):
        table.add_column(overflow="fold")
    for state, name, found, remedy in rows:
        style = {OK: "green", NOTE: "yellow", BAD: "red"}[state]
        text = Text(found) + Text(f" -> {remedy}" if remedy else "", style)
        table.add_row(Text(state, style), Text(name, "bold"), text)
    Console().print(table)


def tell(findings: list[Finding], as_json: bool) -> str:
    """Print the findings.

    Returns:
        Why training cannot run, empty if it can.
    """
    lacking = [one for one in findings if one.state == BAD]
    if as_json:
        print(json.dumps({"ready": not lacking, "findings": [asdict(one) for one in findings]}))
    else:
        show(findings)
    remedies = dict.fromkeys(one.remedy for one in lacking if one.remedy)
    return "; ".join(f"{one.name}: {one.found}" for one in lacking) + "".join(f" -> {remedy}" for remedy in remedies)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    findings = list(packages())
    try:
        checks, cli = (importlib.import_module(f"pointewa.tools.{name}") for name in ("checks", "cli"))
    except Exception as error:  # missing, or broken, as a torch for another system is
        if all(one.state != BAD for one in findings):
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            findings.append(Finding("packages", "imports", BAD, reason, INSTALL))
        reason = tell(findings, "--json" in (sys.argv if argv is None else argv))
        print(f"error: training cannot run: {reason}", file=sys.stderr)
        sys.exit(2)
    from pointewa.errors import ConfigError

    parser = cli.parser(*__doc__.split("\n\n", 1))
    cli.add_config(parser)
    args = parser.parse_intermixed_args(argv)
    config = cli.config_from(args)
    for look in (checks.machine, checks.resources, checks.data_sets):
        findings += look(config)
    if reason := tell(findings, args.json):
        raise ConfigError(f"training cannot run: {reason}")
    if not args.json:
        print(f"training can run: make train DATASET={config.data.name}")


if __name__ == "__main__":
    try:
        from pointewa.tools import cli
    except Exception:
        main()  # reports why
    else:
        cli.run(main)
