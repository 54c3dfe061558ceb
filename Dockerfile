# Installed as on a laptop: hash-pinned requirements by uv, then the project itself without network.
FROM python:3.11-slim AS build
WORKDIR /src
COPY requirements-bootstrap.txt requirements.txt ./
RUN python -m pip install -qq --disable-pip-version-check --root-user-action=ignore \
        --require-hashes --target /bootstrap -r requirements-bootstrap.txt \
    && /bootstrap/bin/uv venv --quiet --no-project --python "$(command -v python)" /opt/backchannel \
    && /bootstrap/bin/uv pip sync --quiet --no-cache --require-hashes --compile-bytecode \
        --python /opt/backchannel requirements.txt
COPY pyproject.toml LICENSE ./
COPY api/ api/
COPY workers/ workers/
COPY backchannel/ backchannel/
RUN PYTHONPATH=/bootstrap /bootstrap/bin/uv pip install --quiet --no-cache --offline --no-deps \
        --no-build-isolation --compile-bytecode --python /opt/backchannel .

FROM python:3.11-slim
RUN useradd --system --uid 10001 --create-home --home-dir /var/lib/backchannel backchannel
COPY --from=build /opt/backchannel /opt/backchannel
ENV PATH=/opt/backchannel/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    BACKCHANNEL_HOME=/var/lib/backchannel
# Not /src: the console script must find the installed packages, not a folder that happens to lie here.
WORKDIR /var/lib/backchannel
USER backchannel
EXPOSE 8000
ENTRYPOINT ["backchannel"]
CMD ["--help"]
