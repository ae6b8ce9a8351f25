// gRPC C++'s callback server as the transport suite's peer: ModelInfer answers the bytes it was sent.
//
// The raw form of the callback API is used (a ByteBuffer is shared, not parsed), which is the fair equal of an echo that
// does not look into the message either. Large messages are let through and windows are left to gRPC's own tuning.
//
// Usage: echo [HOST:PORT]; port 0 takes a free one. Prints the ready line of the bench peers and runs until killed.

#include <grpcpp/grpcpp.h>

#include <cstdio>
#include <string>

#include "echo.grpc.pb.h"

namespace {

using Service = inference::GRPCInferenceService::WithRawCallbackMethod_ModelInfer<inference::GRPCInferenceService::Service>;

class Echo final : public Service {
  grpc::ServerUnaryReactor* ModelInfer(grpc::CallbackServerContext* context, const grpc::ByteBuffer* request,
                                       grpc::ByteBuffer* response) override {
    *response = *request;  // shares the slices
    auto* reactor = context->DefaultReactor();
    reactor->Finish(grpc::Status::OK);
    return reactor;
  }
};

}  // namespace

int main(int argc, char** argv) {
  std::string address = argc > 1 ? argv[1] : "127.0.0.1:0";
  int port = 0;
  Echo service;
  grpc::ServerBuilder builder;
  builder.AddListeningPort(address, grpc::InsecureServerCredentials(), &port);
  builder.SetMaxReceiveMessageSize(64 << 20);
  builder.RegisterService(&service);
  auto server = builder.BuildAndStart();
  if (!server) return 1;
  std::printf("{\"event\":\"ready\",\"grpc\":\"%s:%d\"}\n", address.substr(0, address.rfind(':')).c_str(), port);
  std::fflush(stdout);
  server->Wait();
}
