"""`headrace doctor`: what works on this machine."""

import typer

from headrace.errors import ExitCode

MARKS = {"ok": "[green]ok[/green]", "off": "[yellow]off[/yellow]", "failed": "[bold red]FAILED[/bold red]"}


def doctor() -> None:
    """Say which versions, devices, kernels and optional packages are in use, and try all parts once.

    Leaves with 0 when everything that is required works, else with 2.
    """
    from rich.console import Console
    from rich.markup import escape

    from pretrain.doctor import examine

    console = Console(highlight=False, soft_wrap=True)
    group = ""
    failed = []
    for check in examine():
        if check.group != group:
            group = check.group
            console.print(f"[bold]{group}[/bold]")
        padding = " " * (6 - len(check.state))
        console.print(f"  {MARKS[check.state]}{padding}  {check.name:<19} {escape(check.detail)}")
        if check.state == "failed":
            failed.append(check)
    if failed:
        console.print(f"\n[bold red]{len(failed)} of the required parts do not work:[/bold red]")
        for check in failed:
            console.print(f"  {check.name}: {escape(check.detail)}")
        raise typer.Exit(int(ExitCode.USER_ERROR))
    console.print("\nEverything that is required works.")
