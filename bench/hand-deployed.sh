#!/usr/bin/env bash
# Deploys the source of the active release manually, as people do without a playbook. The services then restart with the active release.
set -e
new=$(mktemp -d /opt/mailroom/hand.XXXX)
tar -C /opt/mailroom/current --exclude=./venv --exclude=./staticfiles -cf - . | tar -C "$new" -xf -
cd "$new"
python3 -m venv venv
venv/bin/pip -q install --require-hashes -r requirements.txt
set -a
. /opt/mailroom/current/environment
set +a
venv/bin/python manage.py check --deploy
venv/bin/python manage.py collectstatic --noinput
venv/bin/python manage.py migrate --noinput
systemctl restart mailroom-web mailroom-relay 'mailroom-worker@*' mailroom-beat
until python3 -c 'import urllib.request; urllib.request.urlopen("http://127.0.0.1:8000/healthz")' 2>/dev/null; do sleep 0.2; done
rm -r "$new"
