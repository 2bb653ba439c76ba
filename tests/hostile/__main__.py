"""Run an attack by hand: ``python -m tests.hostile NAME [--url http://127.0.0.1:8000] [--key KEY]``; its other numbers
and texts are options too."""

import argparse
import inspect

from tests.hostile import bodies, churn, connections, overload

ATTACKS = {
    name: attack
    for module in (bodies, churn, connections, overload)
    for name, attack in vars(module).items()
    if inspect.isfunction(attack) and attack.__module__ == module.__name__ and not name.startswith("_")
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.hostile", description="Attack a server.")
    attacks = parser.add_subparsers(dest="attack", required=True)
    for name, attack in ATTACKS.items():
        options = attacks.add_parser(name, help=(inspect.getdoc(attack) or "").splitlines()[0])
        for option, given in inspect.signature(attack).parameters.items():
            default = "http://127.0.0.1:8000" if option == "url" else given.default
            kind = str if option in ("url", "key") else given.annotation
            if kind in (int, float, str):
                options.add_argument(f"--{option.replace('_', '-')}", type=kind, default=default)
    arguments = vars(parser.parse_args())
    print(ATTACKS[arguments.pop("attack")](**arguments))


if __name__ == "__main__":
    main()
