# The image of a replica (params.yaml → targets.kubernetes.image, targets.sagemaker.image): the
# service and what it imports, and no bundle. A pod brings its bundle (pipelines.deploy.targets.store)
# and SageMaker mounts it; both are checked against their hash before anything in them is opened.
#
#   docker build -f infra/images/serve.Dockerfile -t headrace/serve:latest .

FROM python:3.11-slim-trixie AS packages
WORKDIR /build
RUN pip install --no-cache-dir uv==0.13.9
COPY constraints.txt ./
# What the service and the store import. No torch, no Spark, no MLflow: they would be most of it.
RUN uv venv /opt/venv \
    && uv pip install --no-cache --python /opt/venv/bin/python --compile-bytecode \
        --constraints constraints.txt \
        boto3 cryptography fastapi httptools msgspec numpy onnx onnxruntime prometheus-client \
        psutil pyarrow "pydantic<2.13" pyyaml uvicorn uvloop


FROM python:3.11-slim-trixie
# By number, so that Kubernetes can check runAsNonRoot.
RUN groupadd --gid 10001 headrace \
    && useradd --no-log-init --create-home --uid 10001 --gid 10001 headrace
COPY --from=packages /opt/venv /opt/venv
COPY params.yaml /opt/headrace/
COPY pipelines /opt/headrace/pipelines
# SageMaker starts the image with the word `serve`.
COPY infra/targets/sagemaker/serve /usr/local/bin/serve
# /tmp is the only place that is written to where the file system is read-only.
RUN mkdir /opt/headrace/.state && chown 10001:10001 /opt/headrace/.state
ENV PATH=/opt/venv/bin:$PATH PYTHONPATH=/opt/headrace PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
WORKDIR /opt/headrace
EXPOSE 8080
CMD ["serve"]
