// Tensor cores: products of a warp (mma.sync) and of a warp group (wgmma), which run beside the program until it waits
// for them.
#pragma once
#include "floats.h"

namespace machine {

inline double factor(uint32_t bits, char kind) {
    if (kind == 't') return bits_as<float>(bits & 0xffffe000);
    return kind == 'b' ? bits_as<float>(bits << 16) : widened(static_cast<uint16_t>(bits), 10);
}

inline char kind_of(const Instruction& one) { return one.has("BF16") ? 'b' : one.has("TF32") ? 't' : 'h'; }

inline void hmma(Warp& warp, const Instruction& one) {
    whole_warp(warp);
    require(one.modifiers[0] == "16816" && one.modifiers[1] == "F32" && !one.has("TF32"), "a product of another kind");
    const char kind = kind_of(one);
    double a[16][16], b[16][8], sum[16][8];
    for (int lane = 0; lane < kLanes; ++lane) {
        const int row = lane / 4, column = 2 * (lane % 4);
        for (int i = 0; i < 4; ++i)
            for (int which = 0; which < 2; ++which)
                a[row + 8 * (i % 2)][column + 8 * (i / 2) + which] =
                    factor(raw(warp, one[1], lane, i) >> 16 * which & 0xffff, kind);
        for (int i = 0; i < 2; ++i)
            for (int which = 0; which < 2; ++which)
                b[column + 8 * i + which][row] = factor(raw(warp, one[2], lane, i) >> 16 * which & 0xffff, kind);
        for (int i = 0; i < 4; ++i) sum[row + 8 * (i / 2)][column + i % 2] = bits_as<float>(raw(warp, one[3], lane, i));
    }
    for (int lane = 0; lane < kLanes; ++lane)
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
            double result = 0;
            for (int k = 0; k < 16; ++k) result += a[row][k] * b[k][column];
            write(warp, one[0], lane, bits_as<uint32_t>(static_cast<float>(result + sum[row][column])), i);
        }
}

inline uint32_t permuted(uint32_t address, int width) {
    return width > 16 ? address ^ (address >> 7 & (width / 16 - 1)) << 4 : address;
}

// Of a matrix in shared memory that a descriptor says the layout of.
class SharedMatrix {
  public:
    SharedMatrix(uint64_t descriptor, char kind, bool transposed)
        : kind_(kind),
          size_(kind == 't' ? 4 : 2),
          transposed_(transposed),
          begin_((descriptor & 0x3fff) << 4),
          leading_((descriptor >> 16 & 0x3fff) << 4),
          stride_((descriptor >> 32 & 0x3fff) << 4) {
        require(!(descriptor >> 49 & 7) && !(descriptor >> 14 & 3) && !(descriptor >> 30 & 3) &&
                    !(descriptor >> 46 & 7) && !(descriptor >> 52 & 0x3ff),
                "a matrix descriptor " + hex(descriptor));
        const int widths[4] = {16, 128, 64, 32};
        width_ = widths[descriptor >> 62];
    }

    double at(const Warp& warp, int row, int depth) const {
        uint32_t bits = 0;
        warp.block->read_shared(warp, permuted(begin_ + offset(row, depth), width_), &bits, size_);
        return factor(bits, kind_);
    }

  private:
    uint32_t offset(int row, int depth) const {
        const bool plain = width_ == 16;
        if (!transposed_) {
            const int byte = depth * size_;
            return row / 8 * stride_ + row % 8 * width_ + (plain ? byte / 16 * leading_ + byte % 16 : byte);
        }
        const int byte = row * size_;
        if (plain) return byte / 16 * stride_ + byte % 16 + depth % 8 * 16 + depth / 8 * leading_;
        return byte / width_ * leading_ + byte % width_ + depth % 8 * width_ + depth / 8 * stride_;
    }

    char kind_;
    int size_, width_;
    bool transposed_;
    uint32_t begin_, leading_, stride_;
};

// The warp's sixteen of the group's 64 rows.
inline void multiply(Warp& warp, const Product& one) {
    const int rows = 16, columns = one.columns, depth = one.depth;
    std::vector<double> a(rows * depth), b(columns * depth);
    if (one.first < 0) {
        const SharedMatrix matrix(one.first_descriptor, one.kind, one.first_transposed);
        for (int row = 0; row < rows; ++row)
            for (int k = 0; k < depth; ++k) a[row * depth + k] = matrix.at(warp, 16 * (warp.number % 4) + row, k);
    } else {
        const int each_register = one.kind == 't' ? 1 : 2;
        for (int lane = 0; lane < kLanes; ++lane)
            for (int i = 0; i < 4; ++i)
                for (int which = 0; which < each_register; ++which) {
                    const uint32_t bits = warp.registers[one.first + i][lane] >> 16 * which;
                    const int row = lane / 4 + 8 * (i % 2), k = each_register * (lane % 4 + 4 * (i / 2)) + which;
                    a[row * depth + k] = factor(one.kind == 't' ? bits : bits & 0xffff, one.kind);
                }
    }
    const SharedMatrix matrix(one.second_descriptor, one.kind, one.second_transposed);
    for (int column = 0; column < columns; ++column)
        for (int k = 0; k < depth; ++k) b[column * depth + k] = matrix.at(warp, column, k);
    auto flying = warp.accumulators.find(one.accumulator);
    for (int lane = 0; lane < kLanes; ++lane)
        for (int i = 0; i < columns / 2; ++i) {
            uint32_t& held = flying == warp.accumulators.end() ? warp.registers[one.accumulator + i][lane]
                                                               : flying->second[i * kLanes + lane];
            const int row = lane / 4 + 8 * (i / 2 % 2), column = 8 * (i / 4) + 2 * (lane % 4) + i % 2;
            double sum = 0;
            for (int k = 0; k < depth; ++k) sum += a[row * depth + k] * b[column * depth + k];
            held = bits_as<uint32_t>(static_cast<float>(one.adds ? sum + bits_as<float>(held) : sum));
        }
}

// The accumulator's registers hold nothing of use until the wait.
inline void put_in_flight(Warp& warp, const Product& one) {
    const int count = one.columns / 2;
    for (const auto& [first, values] : warp.accumulators) {
        const int end = first + static_cast<int>(values.size()) / kLanes;
        require(first == one.accumulator ? end == first + count
                                         : end <= one.accumulator || one.accumulator + count <= first,
                "sums in flight that overlap");
    }
    if (!warp.accumulators.count(one.accumulator)) {
        uint32_t* held = warp.registers[one.accumulator];
        warp.accumulators[one.accumulator].assign(held, held + count * kLanes);
        std::fill_n(held, count * kLanes, kInFlight);
    }
    warp.products.open.push_back(one);
}

inline void hgmma(Warp& warp, const Instruction& one) {
    whole_warp(warp);
    Product product{};
    int rows;
    require(sscanf(one.modifiers[0].c_str(), "%dx%dx%d", &rows, &product.columns, &product.depth) == 3 && rows == 64 &&
                one.modifiers[1] == "F32",
            "a product of another kind");
    product.kind = kind_of(one);
    require(product.depth == (product.kind == 't' ? 8 : 16), "a product of another depth");
    size_t next = 1;
    product.accumulator = one[0].index;
    product.first = one[next].kind == kRegister ? one[next++].index : -1;
    require(one[0].index % 4 == 0 && (product.first < 0 || product.first % 4 == 0), "misaligned registers");
    const Operand& matrices = one[next++];
    require(matrices.kind == kMatrix, "no descriptors");
    const auto descriptor = [&](int at) {
        return warp.uniform[at] | static_cast<uint64_t>(warp.uniform[at + 1]) << 32;
    };
    product.first_descriptor = descriptor(matrices.index);
    product.second_descriptor = descriptor(matrices.index + 2);
    product.first_transposed = matrices.name.find(".tnspA") != std::string::npos;
    product.second_transposed = matrices.name.find(".tnspB") != std::string::npos;
    require(product.first < 0 || !product.first_transposed, "a transposed factor in registers");
    const Operand& sum = one[next++];
    product.adds = sum.index != kZero;
    bool ends = false;
    for (; next < one.count(); ++next) {
        if (one[next].kind == kUniformPredicate)
            product.adds = product.adds && predicate(warp, one[next], 0);
        else
            ends = one[next].name == "gsb0";
    }
    require(!product.adds || sum.index == one[0].index, "a sum in other registers");
    if (warp.block->late())
        put_in_flight(warp, product);
    else
        multiply(warp, product);
    if (ends) warp.products.close();
}

inline void warpgroup(Warp& warp, const Instruction& one) {
    if (one.has("ARRIVE")) return;
    require(one.has("DEPBAR") && one[0].name == "gsb0", "a wait of another kind");
    Groups<Product>& products = warp.products;
    while (static_cast<int64_t>(products.closed.size()) > one[1].value) {
        for (const Product& product : products.closed.front()) multiply(warp, product);
        products.closed.pop_front();
    }
    for (auto held = warp.accumulators.begin(); held != warp.accumulators.end();) {
        const auto needs = [&](const Product& product) { return product.accumulator == held->first; };
        bool flies = std::any_of(products.open.begin(), products.open.end(), needs);
        for (const std::vector<Product>& group : products.closed)
            flies |= std::any_of(group.begin(), group.end(), needs);
        if (flies) {
            ++held;
            continue;
        }
        std::copy(held->second.begin(), held->second.end(), warp.registers[held->first]);
        held = warp.accumulators.erase(held);
    }
}

inline const std::map<std::string, Opcode> kProducts = {
    {"HMMA", {hmma, "16816 F32 BF16"}},
    {"HGMMA", {hgmma, "*"}},
    {"WARPGROUP", {warpgroup, "ARRIVE DEPBAR LE"}},
};

}  // namespace machine
