// The messages by which a client registers a model at its broker.
#pragma once

#include <vector>

#include "model/model.h"
#include "wire/message.h"

namespace warmserve {

// Returns the messages with the descriptors of a model's files, which precede the request. Throws
// general if this process has too many open files.
std::vector<Message> files_of(const Model& model);
// Returns the request that registers a model.
Message enrolment_of(const Model& model);

}  // namespace warmserve
