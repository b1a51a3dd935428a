# syntax=docker/dockerfile:1
# gemma-runtime with the demo model, for a CPU or an NVIDIA GPU:
#   docker build --target cpu -t gemma-runtime:cpu .
#   docker build --target cuda -t gemma-runtime:cuda .
# The CUDA libraries come with torch; the driver is the host's.

FROM python:3.12-slim-bookworm AS base
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1
# Converted models and compiled kernels are kept in .cache, a place for a volume.
RUN useradd --create-home --uid 1000 gemma \
    && install --directory --owner=gemma --group=gemma /home/gemma/.cache
ENV NUMBA_CACHE_DIR=/home/gemma/.cache/numba \
    TRITON_CACHE_DIR=/home/gemma/.cache/triton
WORKDIR /home/gemma
ENTRYPOINT ["gemma-runtime"]
CMD ["generate", "A dog running through the snow is", "--max-new-tokens", "64", "--stats"]

FROM base AS cpu
RUN pip install --extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu
RUN --mount=type=bind,target=/source,rw pip install "/source[demo]" transformers==5.23.0
USER 1000

FROM base AS cuda
# Triton compiles its launchers where they run.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
RUN pip install torch==2.13.0
RUN --mount=type=bind,target=/source,rw pip install "/source[demo]" transformers==5.23.0
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000
