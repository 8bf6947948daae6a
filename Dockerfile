# Two images, one after the other in this file:
#
#   docker build --target serve -t homestill/serve .        the endpoint: no compiler, no torch
#   docker build --target trainer -t homestill/trainer .    capture to release, on CUDA
#   docker build --target trainer --build-arg DEVICE=cpu --build-arg TRAINER_BASE_IMAGE=python:3.11-slim-bookworm \
#     --build-arg TRAINER_BUILD_IMAGE=python:3.11-slim-bookworm --build-arg TORCH_INDEX=… -t homestill/trainer .
#
# Every package is locked by hash (requirements/, written by scripts/lock). Nothing is downloaded when a
# container runs but the base model. No frontend is named on the first line: hosts without a registry build too.

# A base is a tag and, where you want it byte for byte, a digest: --build-arg BASE_DIGEST=@sha256:…
ARG BASE_IMAGE=python:3.11-slim-bookworm
ARG BASE_DIGEST=
ARG TRAINER_BASE_IMAGE=nvidia/cuda:13.0.2-runtime-ubuntu24.04
ARG TRAINER_BASE_DIGEST=
ARG TRAINER_BUILD_IMAGE=nvidia/cuda:13.0.2-devel-ubuntu24.04
ARG TRAINER_BUILD_DIGEST=

# ---------------------------------------------------------------- serve, built
FROM ${BASE_IMAGE}${BASE_DIGEST} AS serve-build
# SERVE_LOCK: serve, or predict, which brings DSPy for /v1/predict
ARG SERVE_LOCK=serve
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
COPY requirements/build.txt requirements/${SERVE_LOCK}.txt /requirements/
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv /opt/build && python3 -m venv /opt/homestill \
    && /opt/build/bin/pip install -q --require-hashes --only-binary :all: -r /requirements/build.txt \
    && /opt/homestill/bin/pip install -q --require-hashes --only-binary :all: -r /requirements/${SERVE_LOCK}.txt
COPY pyproject.toml README.md LICENSE /source/
COPY serve /source/serve
COPY docker/finish /usr/local/bin/finish
RUN finish /source

# ---------------------------------------------------------------- serve
FROM ${BASE_IMAGE}${BASE_DIGEST} AS serve
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Homestill serve" \
      org.opencontainers.image.description="One OpenAI-compatible endpoint: the local model where it is proven, the teacher elsewhere" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY docker/user /usr/local/bin/homestill-user
RUN homestill-user
COPY --from=serve-build /opt/homestill /opt/homestill
COPY --from=serve-build /sbom.json /usr/share/homestill/sbom.json
COPY LICENSE /usr/share/homestill/
COPY docker/entry docker/first_start.py docker/serve_healthy.py /usr/share/homestill/
ENV PATH=/opt/homestill/bin:$PATH HOMESTILL_HOME=/data HOME=/tmp PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
WORKDIR /data
VOLUME /data
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s --retries=3 \
    CMD ["python", "/usr/share/homestill/serve_healthy.py"]
ENTRYPOINT ["/usr/share/homestill/entry", "python", "-m", "serve"]
CMD ["--host", "0.0.0.0"]

# ---------------------------------------------------------------- trainer, built
FROM ${TRAINER_BUILD_IMAGE}${TRAINER_BUILD_DIGEST} AS trainer-build
# DEVICE: gpu or cpu. TORCH_INDEX: where pip finds torch's CPU build, for cpu alone.
ARG DEVICE=gpu
ARG TORCH_INDEX=
# A folder of the build image that may hold a llama-cpp-python wheel already made from the locked source.
ARG PREBUILT=/wheels
ARG CUDA_ARCHITECTURES=75-real;80-real;86-real;89-real;90-real;100-real;120
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore DEBIAN_FRONTEND=noninteractive
COPY docker/trainer_build /usr/local/bin/
COPY requirements/build.txt requirements/llama.txt /requirements/
RUN --mount=type=cache,target=/root/.cache/pip trainer_build llama
COPY requirements/trainer-${DEVICE}.txt /requirements/
RUN --mount=type=cache,target=/root/.cache/pip trainer_build packages
COPY pyproject.toml README.md LICENSE /source/
COPY serve /source/serve
COPY trainer /source/trainer
COPY docker/finish /usr/local/bin/finish
RUN finish /source

# ---------------------------------------------------------------- trainer
FROM ${TRAINER_BASE_IMAGE}${TRAINER_BASE_DIGEST} AS trainer
ARG DEVICE=gpu
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Homestill trainer" \
      org.opencontainers.image.description="Captures a DSPy program's traces, fine-tunes a small model on them, and releases it" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY docker/user /usr/local/bin/homestill-user
COPY docker/trainer_runtime /usr/local/bin/
RUN trainer_runtime && homestill-user
COPY --from=trainer-build /opt/homestill /opt/homestill
COPY --from=trainer-build /sbom.json /usr/share/homestill/sbom.json
COPY LICENSE /usr/share/homestill/
COPY docker/entry docker/trainer_healthy /usr/share/homestill/
# Caches lie on the volume: a base model is downloaded once, and compiled kernels survive a restart.
ENV PATH=/opt/homestill/bin:$PATH HOMESTILL_HOME=/data HOME=/tmp PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    HF_HOME=/data/cache/huggingface TRITON_CACHE_DIR=/data/cache/triton MPLCONFIGDIR=/tmp DSPY_CACHEDIR=/tmp/dspy
WORKDIR /data
VOLUME /data
USER 10001:10001
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s --retries=3 CMD ["/usr/share/homestill/trainer_healthy"]
ENTRYPOINT ["/usr/share/homestill/entry", "homestill"]
CMD ["watch", "tasks"]
