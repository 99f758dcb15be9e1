"""The files of a consortium that people and system services read: start scripts, units, proxy, checklist."""

import sys
from pathlib import Path

_START = """#!/bin/sh
# Starts {what} and keeps it running; ends all its processes on SIGTERM.
# Set FEDMIDE_PYTHON to the Python that fedmide is installed in, if that is not python3.
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


_PROXY = """# Lets sites reach /v1/fleet/ and nothing else: the Control API has no password.
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
1. Install fedmide {version} at every site, the same version as here. Every site needs the same base model.
2. Run `server/start.sh`. To start it with the system instead, save the output of
   `fedmide flower server unit server` as /etc/systemd/system/fedmide-server.service and enable that service.
3. {proxy}
4. Run `fedmide flower status server`: it lists every site as connected.

Each site, in its own folder (`site-NAME/`, here FOLDER):
1. Receive the folder over a channel that nobody else can read, because `keys/node-key` identifies the site. The
   coordinator then removes the folder at the server.
2. Edit `site.toml`: set data.path to the path of the site's records. If prompt.template or model.name is a path, set it
   to the path on the site's machine. Relative paths start at FOLDER.
3. Run `fedmide flower site check FOLDER` and fix every problem that it prints.
4. Run `FOLDER/start.sh`. It uses the first python3 on PATH, or the one that FEDMIDE_PYTHON names. To start it with the
   system instead, save the output of `fedmide flower site unit FOLDER` as
   /etc/systemd/system/fedmide-site.service and enable that service. It runs as FOLDER's owner.
   Nothing outside needs to reach the site. The site needs to reach {address} only.

Then, at the server: `fedmide flower run server`.
"""


def start_script(what: str, verb: str) -> str:
    """A script that starts a server or a site in the foreground; its folder may be moved."""
    return _START.format(what=what, verb=verb)


def unit(what: str, folder: Path) -> str:
    """A systemd unit that keeps a folder's start script running, as its owner and with the present Python."""
    place, python = (str(path).replace("%", "%%") for path in (folder.resolve(), sys.executable))
    return _UNIT.format(what=what, folder=place, python=python, user=folder.owner())


def proxy(host: str, port: int, inner: int, folder: Path) -> str:
    """The configuration of nginx as a proxy in front of the SuperLink."""
    return _PROXY.format(host=host, port=port, inner=inner, folder=folder)


def checklist(address: str, version: str, behind_proxy: bool) -> str:
    """The steps that the coordinator and each site must take, in order."""
    rule = (
        "Add `server/nginx.conf` to nginx's configuration, open its port, and keep the SuperLink's port closed."
        if behind_proxy
        else "Nothing to do: all sites are on this machine. It needs no proxy, and no port is open to others."
    )
    return _CHECKLIST.format(address=address, version=version, proxy=rule)
