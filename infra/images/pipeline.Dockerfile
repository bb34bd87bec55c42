# The image of pod mode (params.yaml → orchestrate.image): a checkout of this repository and what
# its stages import. Airflow starts `python -m pipelines.orchestrate.task …` in it, so it has no
# entry point; Airflow itself, the service's extras and the tools of developers are not in it.
#
#   docker build -f infra/images/pipeline.Dockerfile -t headrace/pipeline:latest .
#
#   --build-arg TORCH=cu130   torch for GPUs; the default, cpu, saves some gigabytes of CUDA
#   --build-arg ORIGIN=URL    where a pod finds a run's commit that its image lacks; a URL without
#                             credentials
#
# Credentials come from the environment at run time: the keys of the secret `headrace`
# (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL where S3 is not Amazon's, …).

# 3.11 is what constraints.txt was resolved for. The tag names Debian's release too, because git is
# pinned to it; security fixes of both still arrive with a new build.
FROM python:3.11-slim-trixie AS base
# A run's workspace is a git clone of the checkout in the image, so git is part of the runtime. It
# refuses a repository of another user, which is what the builder's is below, and ours where a
# cluster chooses the pod's user; there is no other repository here to be careful of.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git=1:2.* \
    && rm -rf /var/lib/apt/lists/* \
    && git config --system --add safe.directory '*'


# Before the checkout, and from these two files alone: a commit that changes neither reuses the
# layer.
FROM base AS packages
ARG TORCH=cpu
WORKDIR /build
RUN pip install --no-cache-dir uv==0.13.9
COPY pyproject.toml constraints.txt ./
# The project itself is not installed: a stage runs the code of its run's commit, which is the
# current folder. Bytecode is compiled here, since the user of the pod cannot write beside it.
RUN --mount=type=cache,target=/var/cache/uv \
    export UV_CACHE_DIR=/var/cache/uv \
    && uv venv /opt/venv \
    && UV_LINK_MODE=copy uv pip install --python /opt/venv/bin/python --compile-bytecode \
        --torch-backend "$TORCH" --constraints constraints.txt --requirements pyproject.toml


# What the image holds is a commit, never files beside one; and .git anew, without the hooks, the
# configuration and the credentials of the folder it was built in. The history stays: a run that was
# begun with an older image finds its commit.
FROM base AS checkout
ARG ORIGIN=
RUN --mount=type=bind,source=.git,target=/context/.git \
    git clone --quiet --no-tags --single-branch file:///context/.git /opt/headrace \
    && git -C /opt/headrace remote remove origin \
    && if [ -n "$ORIGIN" ]; then git -C /opt/headrace remote add origin "$ORIGIN"; fi


FROM base
# By number, so that Kubernetes can check runAsNonRoot; with a name, since DVC asks for one.
RUN groupadd --gid 10001 headrace \
    && useradd --no-log-init --create-home --uid 10001 --gid 10001 headrace
COPY --from=packages /opt/venv /opt/venv
# The workspaces, the cache and the state of the pod are written below the checkout.
COPY --from=checkout --chown=10001:10001 /opt/headrace /opt/headrace
# Lines reach Airflow's log as they are printed.
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
USER 10001:10001
# Where the body looks for its commit, and where `python -m pipelines…` finds the code.
WORKDIR /opt/headrace
