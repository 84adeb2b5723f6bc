"""Generated from proto/edgellm/v1 by `make proto`: messages and gRPC stubs of the wire contracts."""
