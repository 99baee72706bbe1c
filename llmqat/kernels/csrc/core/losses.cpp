// The C interface of losses (training.h): checks, and tokens as rows of tasks.
#include "checks.h"
#include "cpu.h"
#include "errors.h"
#include "matrix.h"
#include "team.h"
#include "training.h"

namespace llmqat {
namespace {

void check_losses(const TokenLosses& l) {
    check_size("tokens", l.tokens, 1);
    check_size("the vocabulary", l.vocabulary, 1);
    check_dtype("the logits", l.dtype);
    check_pointer("logits", l.logits), check_pointer("losses", l.losses);
    if (!l.teacher == !l.ids) fail("losses are found from the logits of a teacher or from ids, one of the two");
    if (l.teacher) check_dtype("the teacher's logits", l.teacher_dtype);
    else
        for (int64_t n = 0; n < l.tokens; ++n) check_size("an id", l.ids[n], 0, l.vocabulary - 1);
}

void check_errors(const StateErrors& e) {
    check_size("tokens", e.tokens, 1);
    check_size("the width of a state", e.width, 1);
    check_dtype("the states", e.dtype);
    check_dtype("the targets", e.target_dtype);
    check_pointer("states", e.states), check_pointer("targets", e.targets), check_pointer("factors", e.factors);
    check_pointer("errors", e.errors), check_pointer("gradient", e.gradient);
}

}  // namespace
}  // namespace llmqat

extern "C" {

int32_t llmqat_find_losses(const llmqat_token_losses* losses) {
    return llmqat::guarded([&] {
        llmqat::check_losses(*losses);
        const auto loss = llmqat::variant().train->token_loss;
        llmqat::each_row(losses->tokens, losses->vocabulary, [&](int64_t n) { loss(*losses, n); });
        return 0;
    });
}

int32_t llmqat_find_state_errors(const llmqat_state_errors* errors) {
    return llmqat::guarded([&] {
        llmqat::check_errors(*errors);
        const auto error = llmqat::variant().train->state_error;
        llmqat::each_row(errors->tokens, errors->width, [&](int64_t n) { error(*errors, n); });
        return 0;
    });
}
}
