"""Run an attack by hand: ``python -m tests.hostile NAME --url http://127.0.0.1:8000 [--key KEY]``."""

import argparse
import inspect

from tests.hostile import bodies, connections, overload

ATTACKS = {
    name: attack
    for module in (bodies, connections, overload)
    for name, attack in vars(module).items()
    if inspect.isfunction(attack) and attack.__module__ == module.__name__ and not name.startswith("_")
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.hostile", description="Attack a running server.")
    parser.add_argument("name", choices=ATTACKS)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--key", help="an API key, for attacks behind it")
    arguments = parser.parse_args()
    attack = ATTACKS[arguments.name]
    options = {"key": arguments.key} if "key" in inspect.signature(attack).parameters else {}
    print(attack(arguments.url, **options))


if __name__ == "__main__":
    main()
