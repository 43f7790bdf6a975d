# `make` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
APP_VENV := app/.venv
TESTBED := $(VENV)/bin/python -m testbed
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

# With Molecule's frames, tests/parts.py could not find pytest's summary line.
export MOLECULE_COMMAND_BORDERS := 0

# The slowest scenarios come first, so that the last ones end at about the same time.
SCENARIOS := site site-hosts site-el9 macos projects rabbitmq rabbitmq-cluster rabbitmq43 celery django erlang postgresql any-project nginx flower firewall services ca_certificates built-collection
# Only `make test-all` runs these.
SLOW_SCENARIOS := release operations backups offline_packages monitoring cluster attacks guests valkey projects-built certificates rotation rabbitmq-migration acme environment standby
BENCHMARKS := mail_compare mail_faults mail_load mail_pace broker_celery broker_faults broker_noop deploy_under_load converge
# How many scenarios run in parallel. A scenario mostly waits for its hosts.
JOBS ?= 2
SIDE_BY_SIDE = $(VENV)/bin/python tests/parts.py --jobs $(JOBS)
# `make sandbox PLATFORM=el9` uses another platform in testbed/images.
ifdef PLATFORM
export TESTBED_PLATFORM := $(PLATFORM)
endif

.PHONY: help
help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

# ---- Tools ----

$(VENV)/.complete: requirements/controller.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than 3.11. Use a newer one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
		{ echo "$(PYTHON) can't create virtual environments. On Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	@echo "Installing Ansible and its tools into $(VENV) from requirements/controller.txt (about a minute)"
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install --quiet --quiet --require-hashes --requirement $<
	@touch $@

$(APP_VENV)/.complete: app/requirements-dev.txt
	@echo "Installing the application's packages into $(APP_VENV)"
	@$(PYTHON) -m venv $(APP_VENV)
	@$(APP_VENV)/bin/python -m pip install --quiet --quiet --require-hashes --requirement $<
	@touch $@

# ---- Sandbox and cluster ----

.PHONY: sandbox sandbox-info sandbox-down cluster cluster-info cluster-down
sandbox: $(VENV)/.complete ## Start the whole stack in a container on this machine
cluster: $(VENV)/.complete ## Start an environment with three brokers and a proxy, in nine containers on this machine
sandbox cluster:
	@testbed/install
	@$(TESTBED) up --inventory inventories/$@
	@ansible-playbook -i inventories/$@ playbooks/ops/create_secrets.yml
	@ansible-playbook -i inventories/$@ site.yml
	@$(TESTBED) info --inventory inventories/$@

sandbox-info: $(VENV)/.complete ## Print the addresses and logins of the sandbox's services as JSON
cluster-info: $(VENV)/.complete ## Print the same of the cluster
sandbox-info cluster-info:
	@$(TESTBED) info --inventory inventories/$(@:-info=) --json

sandbox-down: $(VENV)/.complete ## Remove the sandbox
cluster-down: $(VENV)/.complete ## Remove the cluster
sandbox-down cluster-down:
	@$(TESTBED) down --inventory inventories/$(@:-down=)
	@rm -f inventories/$(@:-down=)/group_vars/all/91-secrets.yml

# ---- Environments ----

# The origin excludes variables of the shell, such as MAIL.
OPTION = $(if $(filter command,$(origin $(1))),--$(2) '$($(1))')
.PHONY: environment
environment: $(VENV)/.complete ## Create inventories/NAME with encrypted secrets. At a terminal, it asks for HOST or HOSTS, DOMAIN, MAIL and PLATFORM
	@$(VENV)/bin/python scripts/create_environment.py $(call OPTION,NAME,name) $(call OPTION,HOST,host) $(call OPTION,HOSTS,hosts) \
		$(call OPTION,TOPOLOGY,topology) $(call OPTION,DOMAIN,domain) $(call OPTION,MAIL,mail) $(call OPTION,PLATFORM,platform)

.PHONY: verify
verify: export ANSIBLE_INVENTORY = $(CURDIR)/inventories/$(ENV)
verify: $(VENV)/.complete ## Run the tests of the scenario `site` that only read, on inventories/ENV with the project in app/
	@test -n '$(ENV)' || { echo 'ENV is missing: make verify ENV=staging'; exit 1; }
	@pytest --hosts=ansible://web -m verify_web molecule/site/tests
	@pytest --hosts=ansible://flower -m verify_flower molecule/site/tests

.PHONY: status
status: $(VENV)/.complete ## Report the status of inventories/ENV, also as an HTML page. JSON=1 prints JSON; DRIFT=1 also runs site.yml in check mode
	@test -n '$(ENV)' || { echo 'ENV is missing: make status ENV=staging'; exit 1; }
	@$(VENV)/bin/python scripts/status.py --env '$(ENV)' $(if $(JSON),--json) $(if $(DRIFT),--drift)

# ---- The application without Ansible ----

.PHONY: app
app: $(APP_VENV)/.complete ## Run the application with its own database and mail catcher, for development; Ctrl-C stops it
	@cd app && exec .venv/bin/python -m dev

# ---- Tests ----

.PHONY: test test-all attack bench-quick test-fast lint test-unit test-app-fast test-app broker-up broker-down test-scenarios
test: lint test-unit $(APP_VENV)/.complete ## Run all tests
	@testbed/install
	@tests/install
	@$(SIDE_BY_SIDE) test-app $(addprefix molecule-,$(SCENARIOS))

attack: molecule-attacks $(APP_VENV)/.complete ## Run all attacks: on a host with every layer, and in the other tests
	pytest -m attack
	cd app && .venv/bin/pytest -m attack

test-all: test ## Run everything, including the slow scenarios, and each benchmark with --quick (two to three hours)
	@$(SIDE_BY_SIDE) $(addprefix molecule-,$(SLOW_SCENARIOS))
	@$(MAKE) --no-print-directory bench-quick

test-fast: $(VENV)/.complete $(APP_VENV)/.complete ## Run the tests that need no host (less than two minutes)
	@$(SIDE_BY_SIDE) test-unit test-app-fast lint

lint: $(VENV)/.complete $(APP_VENV)/.complete ## Lint roles, playbooks, Python and workflows; check types and spelling
	yamllint .
	codespell
	ansible-lint
	ruff check .
	ruff format --check .
	mypy
	cd app && ruff check . && ruff format --check .
	cd app && DEBUG=true DATABASE_URL=postgresql:///types .venv/bin/mypy
	check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

test-unit: $(VENV)/.complete ## Run the unit tests, with the coverage of plugins/
	pytest -m "not slow" --cov=plugins --cov-report=term

test-app-fast: $(APP_VENV)/.complete ## Run the application's tests that need no broker and no browser
	cd app && .venv/bin/pytest -m "not browser and not broker"

test-app: $(VENV)/.complete $(APP_VENV)/.complete ## Run the application's tests with RabbitMQ, PostgreSQL and a browser
	@$(MAKE) --no-print-directory broker-up
	url=$$($(TESTBED) info --inventory inventories/app-tests --value broker.url) && cd app && \
		TEST_BROKER_URL=$$url .venv/bin/pytest --cov --cov-report=term:skip-covered
	@$(MAKE) --no-print-directory broker-down

bench-quick: $(VENV)/.complete $(APP_VENV)/.complete ## Run each benchmark with --quick
	@$(MAKE) --no-print-directory broker-up
	@for name in $(BENCHMARKS); do echo "== bench/$$name --quick"; bench/$$name --quick || exit 1; done
	@echo "== bench/broker_faults --nodes 3 --quick"; bench/broker_faults --nodes 3 --quick
	@$(MAKE) --no-print-directory broker-down

broker-up: $(VENV)/.complete $(APP_VENV)/.complete ## Start the broker of the application's tests and of bench/mail_*
	testbed/install
	tests/install
	$(TESTBED) up --inventory inventories/app-tests
	ansible-playbook -i inventories/app-tests playbooks/ops/create_secrets.yml
	ansible-playbook -i inventories/app-tests playbooks/base.yml playbooks/broker.yml

broker-down: $(VENV)/.complete
	$(TESTBED) down --inventory inventories/app-tests

test-scenarios: $(VENV)/.complete ## Run all Molecule scenarios; for a single one: make molecule-rabbitmq
	@testbed/install
	@$(SIDE_BY_SIDE) $(addprefix molecule-,$(SCENARIOS))

molecule-%: $(VENV)/.complete
	@testbed/install
	@molecule test --scenario-name $*

# ---- Releases ----

# The release tools are in a separate virtual environment, because no test needs them.
RELEASE_VENV := .venv-release
$(RELEASE_VENV)/.complete: requirements/release.txt
	@$(PYTHON) -m venv $(RELEASE_VENV)
	@$(RELEASE_VENV)/bin/python -m pip install --quiet --quiet --require-hashes --requirement $<
	@touch $@

# The packages that the roles install on hosts.
DEPLOYED := app/requirements.txt roles/flower/files/requirements.txt roles/postgresql/files/requirements.txt roles/python_environment/files/uv.txt

.PHONY: audit collection
audit: $(RELEASE_VENV)/.complete ## Look for known vulnerabilities in all locks (needs a network)
	@$(RELEASE_VENV)/bin/python requirements/audit.py

collection: $(VENV)/.complete $(RELEASE_VENV)/.complete ## Build the collection and its bills of materials in dist/; SIGN=KEY signs it with this key of gpg
	@mkdir -p dist && rm -f dist/*.tar.gz dist/*.cdx.json dist/MANIFEST.json.asc
	@ansible-galaxy collection build --output-path dist
	@for lock in $(DEPLOYED); do \
		name=$${lock%/files/requirements.txt}; name=$${name%.txt}; \
		$(RELEASE_VENV)/bin/cyclonedx-py requirements --output-reproducible --output-file dist/$${name//\//-}.cdx.json $$lock; \
	done
	@$(if $(SIGN),tar --extract --to-stdout --file dist/django_celery-stack-*.tar.gz MANIFEST.json | \
		gpg --local-user '$(SIGN)' --armor --detach-sign --output dist/MANIFEST.json.asc)
	@ls -1 dist

.PHONY: offline-packages
molecule-offline_packages: offline-packages
offline-packages: export ANSIBLE_INVENTORY = inventories/offline-packages
offline-packages: $(VENV)/.complete ## Gather all packages for hosts without a network, in dist/offline-packages-debian13.tar
	@testbed/install
	@$(TESTBED) up --inventory $(ANSIBLE_INVENTORY)
	@ansible-playbook playbooks/ops/create_secrets.yml
	@ansible-playbook playbooks/ops/gather_offline_packages.yml
	@$(TESTBED) down --inventory $(ANSIBLE_INVENTORY)
	@rm -f $(ANSIBLE_INVENTORY)/group_vars/all/91-secrets.yml
	@git archive --output dist/repository.tar.gz HEAD
	@ls -sh dist

# ---- Upkeep ----

.PHONY: docs docs-site lock
docs: $(VENV)/.complete ## Generate the roles' READMEs from their argument specs
	$(VENV)/bin/python docs/generate_roles.py

# In a separate virtual environment, because no test needs it.
DOCS_VENV := .venv-docs
$(DOCS_VENV)/.complete: requirements/docs.txt
	@$(PYTHON) -m venv $(DOCS_VENV)
	@$(DOCS_VENV)/bin/python -m pip install --quiet --quiet --require-hashes --requirement $<
	@touch $@

docs-site: $(DOCS_VENV)/.complete ## Build the documentation as a site in dist/site; a broken link is an error
	@# With --quiet, --strict would not see the warnings.
	@NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict
	@echo "The site: dist/site/index.html"

.PHONY: pictures
pictures: $(VENV)/.complete $(APP_VENV)/.complete ## Take the pictures of the README from the running sandbox
	@tests/install
	@# The report also exists if it has warnings (1) or faults (2).
	@$(VENV)/bin/python scripts/status.py --env sandbox >/dev/null || [ $$? -lt 3 ]
	@$(TESTBED) info --inventory inventories/sandbox --json | $(APP_VENV)/bin/python docs/take_pictures.py

LOCK := uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header
lock: ## Update the locks with uv to the newest versions that the requirements allow
	$(LOCK) --upgrade requirements/controller.in --output-file requirements/controller.txt
	$(LOCK) --upgrade requirements/release.in --output-file requirements/release.txt
	$(LOCK) --upgrade requirements/docs.in --output-file requirements/docs.txt
	$(LOCK) --upgrade roles/flower/files/requirements.in --output-file roles/flower/files/requirements.txt
	$(LOCK) --upgrade roles/python_environment/files/uv.in --output-file roles/python_environment/files/uv.txt
	$(LOCK) --upgrade roles/postgresql/files/requirements.in --output-file roles/postgresql/files/requirements.txt
	cd app && $(LOCK) --upgrade pyproject.toml --extra site --output-file requirements.txt
	cd app && $(LOCK) --upgrade pyproject.toml --extra dev --output-file requirements-dev.txt
