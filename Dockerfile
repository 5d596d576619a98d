# Images to train in, for NVIDIA GPUs and for TPUs:
#
#     docker build --target cuda --tag diht_jax:cuda .
#     docker build --target tpu --tag diht_jax:tpu .
#
# CUDA and libtpu come with JAX from the package index; of the host they need the driver alone.
# Versions are those of requirements.txt and requirements-dev.txt, the tested set.

FROM python:3.11-slim-bookworm AS base
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
WORKDIR /diht_jax
# Packages come before the sources, so that a change there does not install them again.
COPY LICENSE NOTICE README.md pyproject.toml requirements.txt requirements-dev.txt ./
# Constraints may not have extras. Of the extra eval, clip-benchmark gives class names and prompts by
# its data files, which need neither torch nor what else it depends on.
RUN sed 's/\[.*\]//' requirements.txt requirements-dev.txt > /constraints.txt \
    && pip install --constraint /constraints.txt '.[cloud]' \
    && pip install --constraint /constraints.txt --no-deps clip-benchmark usearch

FROM base AS cuda
# The NVIDIA container toolkit hands the driver on to images that ask for it.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
# NCCL loads these to reach InfiniBand and RoCE cards; without them it falls back to sockets.
RUN apt-get update \
    && apt-get install -y --no-install-recommends ibverbs-providers libibverbs1 librdmacm1 \
    && rm -rf /var/lib/apt/lists/*
RUN pip install --constraint /constraints.txt '.[gpu]'
COPY . .
RUN pip install --no-deps --editable .

FROM base AS tpu
RUN pip install --constraint /constraints.txt '.[tpu]'
COPY . .
RUN pip install --no-deps --editable .
