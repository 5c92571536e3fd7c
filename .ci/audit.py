"""
Runs pip-audit over the packages in a folder. Fails for a known vulnerability; says so if nothing could be audited.

    python .ci/audit.py SITE_PACKAGES
"""

import json
import subprocess
import sys


IGNORED: dict[str, str] = {}  # id of a vulnerability: why it does not matter here


def main(folder: str) -> str | None:
    """Returns the argument of `sys.exit`: the known vulnerabilities, or None."""
    command = ["pip-audit", "--path", folder, "--format", "json", "--progress-spinner", "off"]
    done = subprocess.run(command, capture_output=True, text=True)
    if not done.stdout and not any(name in done.stderr for name in ("ConnectionError", "Timeout", "ServiceError")):
        return f"pip-audit ended with exit status {done.returncode}: {done.stderr[-2000:]}"
    packages = json.loads(done.stdout)["dependencies"] if done.stdout else []
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    if len(skipped) == len(packages):
        print("pip-audit: NOT AUDITED: no advisory service can be reached")
        return None
    print(f"pip-audit: {len(packages) - len(skipped)} packages audited, NOT audited: {', '.join(skipped) or 'none'}")
    found = [
        f"{package['name']} {package['version']}: {flaw['id']}, fixed in {', '.join(flaw['fix_versions']) or 'none'}"
        for package in packages
        for flaw in package.get("vulns", [])
        if not {flaw["id"], *flaw["aliases"]} & set(IGNORED)
    ]
    return "\n".join(found) or None


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
