"""The files of a consortium that people and system services read: start scripts, units, proxy, checklist."""

import sys
from pathlib import Path

_START = """#!/bin/sh
# Starts {what} and keeps it running; ends all of it on SIGTERM.
# FEDMIDE_PYTHON is the Python that fedmide is installed in, where that is not python3.
exec "${{FEDMIDE_PYTHON:-python3}}" -m fedmide flower {verb} start "$(dirname "$0")"
"""


_UNIT = """[Unit]
Description=fedmide {what}
After=network-online.target
Wants=network-online.target

[Service]
User={user}
WorkingDirectory={folder}
Environment="FEDMIDE_PYTHON={python}"
ExecStart="{folder}/start.sh"
Restart=always
RestartSec=5
KillMode=control-group
TimeoutStopSec=60
UMask=0077
NoNewPrivileges=yes
ProtectSystem=full

[Install]
WantedBy=multi-user.target
"""


_PROXY = """# Lets sites reach /v1/fleet/ and nothing else: the Control API asks nobody for a password.
server {{
    listen {port} ssl;
    server_name {host};
    ssl_certificate {folder}/keys/server.pem;
    ssl_certificate_key {folder}/keys/server.key;
    ssl_protocols TLSv1.2 TLSv1.3;
    client_max_body_size 0;
    proxy_read_timeout 300s;

    location /v1/fleet/ {{
        proxy_pass https://127.0.0.1:{inner};
        proxy_ssl_trusted_certificate {folder}/keys/ca.pem;
        proxy_ssl_verify on;
        proxy_ssl_name localhost;
        proxy_set_header Host $http_host;
        proxy_request_buffering off;
        proxy_buffering off;
    }}
    location / {{
        return 404;
    }}
}}
"""


_CHECKLIST = """# Checklist of the consortium

Server ({address}), in `server/`:
1. Every site has installed fedmide {version}, the same as here, and has the same base model.
2. `server/start.sh` runs; or what `fedmide flower server unit server` prints is in
   /etc/systemd/system/fedmide-server.service, and that is enabled.
3. {proxy}
4. `fedmide flower status server` names every site as connected.

Each site, in its own folder (`site-NAME/`):
1. Its folder came over a channel that nobody else can read: `keys/node-key` is what the site is known by. It was then
   removed here.
2. `site.toml`: data.path leads to the site's records, prompt.template and model.name to what lies on its machine. Paths
   count from FOLDER.
3. `fedmide flower site check FOLDER` finds nothing to mend.
4. `FOLDER/start.sh` runs, with the python3 that comes first on PATH or the one that FEDMIDE_PYTHON names; or what
   `fedmide flower site unit FOLDER` prints is in /etc/systemd/system/fedmide-site.service, and that is enabled: it
   runs as FOLDER's owner. Nothing from outside needs to reach the site; it needs to reach {address} only.

Then, at the server: `fedmide flower run server`.
"""


def start_script(what: str, verb: str) -> str:
    """What starts a server or a site in the foreground, from wherever its folder lies by then."""
    return _START.format(what=what, verb=verb)


def unit(what: str, folder: Path) -> str:
    """A systemd unit that keeps the start script in a folder running, as its owner and with the Python of now."""
    place, python = (str(path).replace("%", "%%") for path in (folder.resolve(), sys.executable))
    return _UNIT.format(what=what, folder=place, python=python, user=folder.owner())


def proxy(host: str, port: int, inner: int, folder: Path) -> str:
    """An nginx site in front of the SuperLink."""
    return _PROXY.format(host=host, port=port, inner=inner, folder=folder)


def checklist(address: str, version: str, behind_proxy: bool) -> str:
    """What is to be done, in order, by whom."""
    rule = (
        "`server/nginx.conf` is in nginx's sites, and port 443 or the one named in it is open; the SuperLink's is not."
        if behind_proxy
        else "All sites are on this machine: no proxy is needed, and no port is open to others."
    )
    return _CHECKLIST.format(address=address, version=version, proxy=rule)
